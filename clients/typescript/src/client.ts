/** A connection to one server, and its calls. */

import {
  create,
  type DescMessage,
  type DescMethod,
  type DescMethodUnary,
  type DescService,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from "@bufbuild/protobuf";
import * as grpc from "@grpc/grpc-js";

import { cancelled, Code, IncompleteStreamError, MlxpoolError, typedError } from "./errors.js";
import type { GenerationEvent, LoadEvent } from "./events.js";
import { MemoryService } from "./gen/mlxpool/v1/memory_service_pb.js";
import { ModelService } from "./gen/mlxpool/v1/model_service_pb.js";
import type { GenerateInit, LoadModelInit } from "./requests.js";
import { channelCredentials, checkKey, isLoopback, type TlsFiles } from "./security.js";

export const DEFAULT_TARGET = "127.0.0.1:50051";

// gRPC retries only what has not produced a message yet, so an answer never starts twice. With
// nothing listening the four attempts are over in about a second.
const SERVICE_CONFIG = {
  loadBalancingConfig: [],
  methodConfig: [
    {
      name: [{ service: "mlxpool.v1.ModelService" }, { service: "mlxpool.v1.MemoryService" }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.1s",
        maxBackoff: "2s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
};

export interface ClientOptions {
  /** true, or the files to use; false = plaintext, even for a key to another machine. */
  readonly tls?: boolean | TlsFiles | undefined;
  /** Sent with every call. */
  readonly apiKey?: string | undefined;
  /** Calls wait for the server to come up, up to their deadline, instead of failing after a second. */
  readonly waitForReady?: boolean | undefined;
  /** The deadline of every call that does not name its own; none by default. */
  readonly timeoutMs?: number | undefined;
  /** gRPC's own options, on top. */
  readonly channelOptions?: grpc.ChannelOptions | undefined;
}

export interface CallOptions {
  /** Cancels the call; the error then has the signal's reason as its cause. */
  readonly signal?: AbortSignal | undefined;
  /** The deadline: what a generation had produced by then is lost. */
  readonly timeoutMs?: number | undefined;
}

/** The calls of a service that answer once. */
export type UnaryCalls<S extends DescService> = {
  readonly [Name in keyof S["method"] as S["method"][Name] extends DescMethodUnary
    ? Name
    : never]: S["method"][Name] extends DescMethodUnary<infer Input, infer Output>
    ? (request: MessageInitShape<Input>, options?: CallOptions) => Promise<MessageShape<Output>>
    : never;
};

/**
 * A connection to one server; close() it. It connects with the first call.
 *
 * Failed calls throw MlxpoolError. UNAVAILABLE is retried up to three times, and only as long as no
 * message has arrived: an answer never starts twice.
 */
export class Client {
  /** The calls without a stream, as in the contract: `client.models.getModel({ model: "demo" })`. */
  readonly models: UnaryCalls<typeof ModelService>;
  readonly memory: UnaryCalls<typeof MemoryService>;
  readonly #grpc: grpc.Client;
  readonly #options: ClientOptions;
  readonly #target: string;

  constructor(target: string = DEFAULT_TARGET, options: ClientOptions = {}) {
    if (options.apiKey !== undefined) {
      checkKey(options.apiKey, target, options.tls);
    }
    this.#target = target;
    this.#options = options;
    this.#grpc = new grpc.Client(target, channelCredentials(options.tls), {
      "grpc.max_receive_message_length": 64 * 2 ** 20,
      // The server answers pings more frequent than every 10 s with GOAWAY.
      "grpc.keepalive_time_ms": 30_000,
      "grpc.keepalive_timeout_ms": 10_000,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": 5_000,
      "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
      "grpc.service_config_disable_resolution": 1,
      ...(isLoopback(target) && { "grpc.enable_http_proxy": 0 }),
      ...options.channelOptions,
    });
    this.models = this.#unaryCalls(ModelService);
    this.memory = this.#unaryCalls(MemoryService);
  }

  /** Closes the connection once the calls in flight are over. */
  close(): void {
    this.#grpc.close();
  }

  /** Waits until the connection stands. Throws MlxpoolError (UNAVAILABLE) when it does not in time. */
  async waitUntilReady(timeoutMs: number): Promise<void> {
    const error = await new Promise<Error | undefined>((resolve) => {
      this.#grpc.waitForReady(Date.now() + timeoutMs, resolve);
    });
    if (error) {
      const message = `nothing answered at ${this.#target} within ${timeoutMs} ms`;
      throw new MlxpoolError(message, Code.UNAVAILABLE, undefined, { cause: error });
    }
  }

  /**
   * Streams one generation. It starts with the loop over it; leaving the loop cancels it and frees
   * its slot, and so does the signal, after which no more events come.
   */
  async *generate(
    request: GenerateInit,
    options: CallOptions = {},
  ): AsyncGenerator<GenerationEvent, void, undefined> {
    for await (const { event } of this.#stream(ModelService.method.generate, request, options)) {
      if (event.case !== undefined) {
        yield event;
      }
    }
  }

  /** Loads a model, or watches a load. Leaving the loop stops watching; only unloadModel stops it. */
  async *load(
    request: LoadModelInit,
    options: CallOptions = {},
  ): AsyncGenerator<LoadEvent, void, undefined> {
    for await (const { event } of this.#stream(ModelService.method.loadModel, request, options)) {
      if (event.case !== undefined) {
        yield event;
      }
    }
  }

  async *#stream<
    I extends DescMessage,
    O extends DescMessage,
  >(
    method: DescMethod & { input: I; output: O },
    request: MessageInitShape<I>,
    options: CallOptions,
  ): AsyncGenerator<MessageShape<O> & WithEvent, void, undefined> {
    const { signal } = options;
    if (signal?.aborted) {
      throw cancelled(signal);
    }
    const call = this.#grpc.makeServerStreamRequest(
      path(method),
      serializer(method.input),
      deserializer(method.output),
      create(method.input, request),
      this.#metadata(),
      this.#callOptions(options),
    );
    // Cancelling makes it say CANCELLED when nobody listens any more.
    call.on("error", () => {});
    const stop = () => call.cancel();
    signal?.addEventListener("abort", stop, { once: true });
    let hasEnded = false;
    try {
      for await (const response of call) {
        if (signal?.aborted) {
          // It was on its way when the caller gave up.
          throw cancelled(signal);
        }
        hasEnded ||= (response as WithEvent).event.case === "finished";
        yield response as MessageShape<O> & WithEvent;
      }
    } catch (error) {
      throw typedError(error, signal);
    } finally {
      signal?.removeEventListener("abort", stop);
      call.cancel();
    }
    if (!hasEnded) {
      throw new IncompleteStreamError();
    }
  }

  #unaryCalls<S extends DescService>(service: S): UnaryCalls<S> {
    const calls = service.methods
      .filter((method) => method.methodKind === "unary")
      .map((method) => [
        method.localName,
        (request: MessageInitShape<DescMessage>, options: CallOptions = {}) =>
          this.#unary(method, request, options),
      ]);
    return Object.fromEntries(calls) as UnaryCalls<S>;
  }

  #unary(
    method: DescMethod,
    request: MessageInitShape<DescMessage>,
    options: CallOptions,
  ): Promise<MessageShape<DescMessage>> {
    const { signal } = options;
    return new Promise((resolve, reject) => {
      if (signal?.aborted) {
        reject(cancelled(signal));
        return;
      }
      const stop = () => call.cancel();
      const call = this.#grpc.makeUnaryRequest(
        path(method),
        serializer(method.input),
        deserializer(method.output),
        create(method.input, request),
        this.#metadata(),
        this.#callOptions(options),
        (error, response) => {
          signal?.removeEventListener("abort", stop);
          if (error || !response) {
            reject(typedError(error, signal));
          } else {
            resolve(response);
          }
        },
      );
      signal?.addEventListener("abort", stop, { once: true });
    });
  }

  #metadata(): grpc.Metadata {
    const metadata = new grpc.Metadata({ waitForReady: this.#options.waitForReady ?? false });
    if (this.#options.apiKey !== undefined) {
      metadata.set("authorization", `Bearer ${this.#options.apiKey}`);
    }
    return metadata;
  }

  #callOptions(options: CallOptions): grpc.CallOptions {
    const timeoutMs = options.timeoutMs ?? this.#options.timeoutMs;
    return timeoutMs === undefined ? {} : { deadline: Date.now() + timeoutMs };
  }
}

interface WithEvent {
  readonly event: { readonly case: string | undefined };
}

function path(method: DescMethod): string {
  return `/${method.parent.typeName}/${method.name}`;
}

function serializer<M extends DescMessage>(schema: M): (message: MessageShape<M>) => Buffer {
  return (message) => Buffer.from(toBinary(schema, message));
}

function deserializer<M extends DescMessage>(schema: M): (bytes: Buffer) => MessageShape<M> {
  return (bytes) => fromBinary(schema, bytes);
}
