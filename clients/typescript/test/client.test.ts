import assert from "node:assert/strict";
import { once } from "node:events";
import { afterEach, test } from "node:test";
import { create, fromBinary, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { anyPack } from "@bufbuild/protobuf/wkt";
import * as grpc from "@grpc/grpc-js";

import {
  BadRequestSchema,
  ErrorInfoSchema,
  RetryInfoSchema,
} from "../src/gen/google/rpc/error_details_pb.js";
import { StatusSchema } from "../src/gen/google/rpc/status_pb.js";
import * as mlxpool from "../src/index.js";
import { checkKey } from "../src/security.js";

const { generate, getModel } = mlxpool.ModelService.method;
type Event = NonNullable<MessageInitShape<typeof mlxpool.GenerateResponseSchema>["event"]>;
type Stream = grpc.ServerWritableStream<unknown, Event>;
type Unary = grpc.ServerUnaryCall<unknown, unknown>;

const STARTED: Event = { case: "started", value: { seed: 9007199254740993n } };
const finished = (content: string): Event => ({
  case: "finished",
  value: { message: mlxpool.assistant(content) },
});
const REQUEST = { model: "m", prompt: mlxpool.text("p") };

const closers: (() => void)[] = [];
afterEach(() => {
  for (const close of closers.splice(0)) {
    close();
  }
});

interface Fake {
  generate?: (stream: Stream) => void;
  getModel?: (call: Unary, answer: (error: Partial<grpc.ServiceError> | null) => void) => void;
}

/** A client of a server that does what the test says. */
async function serve(fake: Fake, options: mlxpool.ClientOptions = {}): Promise<mlxpool.Client> {
  const server = new grpc.Server();
  const common = { requestStream: false, requestDeserialize: (bytes: Buffer) => bytes, requestSerialize: (bytes: Buffer) => bytes };
  server.addService(
    {
      generate: {
        ...common,
        path: "/mlxpool.v1.ModelService/Generate",
        responseStream: true,
        responseSerialize: (event: Event) =>
          Buffer.from(toBinary(generate.output, create(generate.output, { event }))),
        responseDeserialize: (bytes: Buffer) => fromBinary(generate.output, bytes),
      },
      getModel: {
        ...common,
        path: "/mlxpool.v1.ModelService/GetModel",
        responseStream: false,
        responseSerialize: () => Buffer.from(toBinary(getModel.output, create(getModel.output))),
        responseDeserialize: (bytes: Buffer) => fromBinary(getModel.output, bytes),
      },
    },
    {
      generate: (stream: Stream) => fake.generate?.(stream),
      getModel: (call: Unary, done: grpc.sendUnaryData<unknown>) =>
        fake.getModel?.(call, (error) => done(error, {})),
    },
  );
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (error, bound) =>
      error ? reject(error) : resolve(bound),
    );
  });
  const client = new mlxpool.Client(`127.0.0.1:${port}`, { timeoutMs: 20_000, ...options });
  closers.push(() => client.close(), () => server.forceShutdown());
  return client;
}

/** The error that a promise rejects with, typed. */
async function failureOf(promise: Promise<unknown>): Promise<mlxpool.MlxpoolError> {
  const [result] = await Promise.allSettled([promise]);
  assert(result?.status === "rejected");
  assert(result.reason instanceof mlxpool.MlxpoolError, String(result.reason));
  return result.reason;
}

async function drain(events: AsyncIterable<mlxpool.GenerationEvent>): Promise<string[]> {
  const seen: string[] = [];
  for await (const event of events) {
    seen.push(event.case);
  }
  return seen;
}

test("events come in order, and int64 is a bigint", async () => {
  const client = await serve({
    generate: (stream) => {
      for (const event of [STARTED, { case: "delta", value: { content: { case: "text", value: "yes" } } } as const, finished("yes")]) {
        stream.write(event);
      }
      stream.end();
    },
  });
  const texts: string[] = [];
  for await (const event of client.generate(REQUEST)) {
    if (event.case === "started") {
      assert.equal(event.value.seed, 9007199254740993n);
    } else if (event.case === "delta") {
      texts.push(mlxpool.deltaText(event.value));
    } else if (event.case === "finished") {
      texts.push(mlxpool.messageText(event.value.message));
    }
  }
  assert.deepEqual(texts, ["yes", "yes"]);
});

test("leaving the loop cancels the call", async () => {
  let heard: Promise<unknown> | undefined;
  const client = await serve({
    generate: (stream) => {
      heard = once(stream, "cancelled");
      stream.write(STARTED);
    },
  });
  for await (const _ of client.generate(REQUEST)) {
    break;
  }
  await heard;
});

test("a signal cancels the call, and is the error's cause", async () => {
  let heard: Promise<unknown> | undefined;
  const client = await serve({
    generate: (stream) => {
      heard = once(stream, "cancelled");
      stream.write(STARTED);
      stream.write(STARTED);
    },
  });
  const controller = new AbortController();
  let count = 0;
  const failure = await failureOf(
    (async () => {
      for await (const _ of client.generate(REQUEST, { signal: controller.signal })) {
        count += 1;
        controller.abort("enough");
      }
    })(),
  );
  assert.equal(failure.code, mlxpool.Code.CANCELLED);
  assert.equal(failure.cause, "enough");
  assert.equal(count, 1);
  await heard;
});

test("a signal that is over already sends nothing", async () => {
  const client = await serve({
    generate: () => assert.fail("it was called"),
    getModel: () => assert.fail("it was called"),
  });
  const options = { signal: AbortSignal.abort() };
  const calls = [drain(client.generate(REQUEST, options)), client.models.getModel({}, options)];
  for (const call of calls) {
    assert.equal((await failureOf(call)).code, mlxpool.Code.CANCELLED);
  }
});

test("a signal cancels a call without a stream", async () => {
  const controller = new AbortController();
  const client = await serve({ getModel: () => controller.abort() });
  const failure = await failureOf(client.models.getModel({}, { signal: controller.signal }));
  assert.equal(failure.code, mlxpool.Code.CANCELLED);
});

test("a deadline is DEADLINE_EXCEEDED", async () => {
  const client = await serve({ generate: (stream) => stream.write(STARTED) });
  const failure = await failureOf(drain(client.generate(REQUEST, { timeoutMs: 200 })));
  assert.equal(failure.code, mlxpool.Code.DEADLINE_EXCEEDED);
});

test("a stream without its last event is incomplete", async () => {
  const client = await serve({
    generate: (stream) => {
      stream.write(STARTED);
      stream.end();
    },
  });
  assert((await failureOf(drain(client.generate(REQUEST)))) instanceof mlxpool.IncompleteStreamError);
});

test("the details of an error are its fields", async () => {
  const status = create(StatusSchema, {
    details: [
      anyPack(ErrorInfoSchema, create(ErrorInfoSchema, { domain: "mlxpool", reason: "QUEUE_FULL", metadata: { a: "b" } })),
      anyPack(BadRequestSchema, create(BadRequestSchema, { fieldViolations: [{ field: "f", description: "d" }] })),
      anyPack(RetryInfoSchema, create(RetryInfoSchema, { retryDelay: { seconds: 1n, nanos: 500_000_000 } })),
    ],
  });
  const metadata = new grpc.Metadata();
  metadata.set("grpc-status-details-bin", Buffer.from(toBinary(StatusSchema, status)));
  const error = { code: grpc.status.RESOURCE_EXHAUSTED, details: "full", metadata };
  const client = await serve({
    generate: (stream) => stream.emit("error", error),
    getModel: (_, answer) => answer(error),
  });
  for (const call of [drain(client.generate(REQUEST)), client.models.getModel({})]) {
    const failure = await failureOf(call);
    assert.deepEqual(
      { ...failure, message: failure.message, cause: undefined },
      {
        name: "MlxpoolError",
        message: "full",
        cause: undefined,
        code: mlxpool.Code.RESOURCE_EXHAUSTED,
        reason: "QUEUE_FULL",
        metadata: { a: "b" },
        fieldViolations: [{ field: "f", description: "d" }],
        retryAfterMs: 1500,
      },
    );
  }
});

test("the key is sent with every call", async () => {
  const got: unknown[] = [];
  const fake: Fake = {
    getModel: (call, answer) => {
      got.push(...call.metadata.get("authorization"));
      answer(null);
    },
  };
  for (const options of [{}, { apiKey: "secret" }]) {
    const client = await serve(fake, options);
    await client.models.getModel({ model: "m" });
  }
  assert.deepEqual(got, ["Bearer secret"]);
});

test("a key stays on this machine, or is encrypted, unless told otherwise", () => {
  for (const target of ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/m", "dns:///[::1]:1"]) {
    checkKey("secret", target, undefined);
  }
  for (const target of ["model.example:1", "10.0.0.1:1", "127.example:1", "dns:///host:1"]) {
    assert.throws(() => new mlxpool.Client(target, { apiKey: "secret" }), /plaintext/);
    checkKey("secret", target, true);
    checkKey("secret", target, false);
  }
  for (const wrong of ["", "secret\n", "two words", "schlüssel"]) {
    assert.throws(() => checkKey(wrong, "127.0.0.1:1", undefined), /no key has/);
  }
});

test("half a client certificate is an error", () => {
  assert.throws(() => new mlxpool.Client("h:1", { tls: { certificate: "tls.crt" } }), /needs its key/);
  assert.throws(() => new mlxpool.Client("h:1", { tls: { ca: "/missing.crt" } }), /ENOENT/);
});

test("waitUntilReady returns when the connection stands, and throws when it does not", async () => {
  await (await serve({})).waitUntilReady(20_000);
  const nobody = new grpc.Server();
  const port = await new Promise<number>((resolve) => {
    nobody.bindAsync("127.0.0.1:0", grpc.ServerCredentials.createInsecure(), (_, bound) => resolve(bound));
  });
  nobody.forceShutdown();
  const client = new mlxpool.Client(`127.0.0.1:${port}`);
  const failure = await failureOf(client.waitUntilReady(300));
  client.close();
  assert.equal(failure.code, mlxpool.Code.UNAVAILABLE);
});

test("messages have their role and text", () => {
  const { Role } = mlxpool;
  for (const [message, role] of [
    [mlxpool.system("a"), Role.SYSTEM],
    [mlxpool.user("a"), Role.USER],
    [mlxpool.assistant("a"), Role.ASSISTANT],
    [mlxpool.toolResult("c", "a"), Role.TOOL],
  ] as const) {
    assert.equal(message.role, role);
    assert.equal(mlxpool.messageText(message), "a");
  }
  assert.equal(mlxpool.toolResult("c", "a").toolCallId, "c");
  assert.equal(mlxpool.chat(mlxpool.user("a")).input?.case, "chat");
});
