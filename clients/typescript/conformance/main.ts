/** The TypeScript client behind the conformance suite's protocol: tests/conformance/README.md. */

import { createInterface } from "node:readline";
import { type DescMessage, fromJson, type JsonValue, type MessageShape, toJson } from "@bufbuild/protobuf";

import * as mlxpool from "../src/index.js";

interface Call {
  readonly target: string;
  readonly method: string;
  readonly request: JsonValue;
  readonly timeout_s: number;
  readonly tls_ca?: string;
  readonly api_key?: string;
  readonly wait_for_ready?: boolean;
  readonly cancel_after_events?: number;
}

const UNARY = {
  CountTokens: mlxpool.ModelService.method.countTokens,
  Tokenize: mlxpool.ModelService.method.tokenize,
  GetModel: mlxpool.ModelService.method.getModel,
  CancelGeneration: mlxpool.ModelService.method.cancelGeneration,
};

for await (const line of createInterface({ input: process.stdin, crlfDelay: Infinity })) {
  await perform(JSON.parse(line) as Call);
}

function write(line: unknown): void {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

async function perform(call: Call): Promise<void> {
  const client = new mlxpool.Client(call.target, {
    tls: call.tls_ca === undefined ? undefined : { ca: call.tls_ca },
    apiKey: call.api_key,
    waitForReady: call.wait_for_ready,
    timeoutMs: call.timeout_s * 1000,
  });
  try {
    await send(client, call);
    write({ end: { code: "OK" } });
  } catch (error) {
    if (!(error instanceof mlxpool.MlxpoolError)) {
      throw error;
    }
    write({ end: ending(error) });
  } finally {
    client.close();
  }
}

async function send(client: mlxpool.Client, call: Call): Promise<void> {
  const controller = new AbortController();
  const options = { signal: controller.signal };
  let count = 0;
  const seen = (event: JsonValue) => {
    write({ event });
    count += 1;
    if (count === call.cancel_after_events) {
      controller.abort();
    }
  };
  if (call.method === "Generate") {
    const request = fromJson(mlxpool.GenerateRequestSchema, call.request);
    for await (const event of client.generate(request, options)) {
      seen(json(mlxpool.GenerateResponseSchema, { $typeName: "mlxpool.v1.GenerateResponse", event }));
    }
  } else if (call.method === "LoadModel") {
    const request = fromJson(mlxpool.LoadModelRequestSchema, call.request);
    for await (const event of client.load(request, options)) {
      seen(json(mlxpool.LoadModelResponseSchema, { $typeName: "mlxpool.v1.LoadModelResponse", event }));
    }
  } else {
    const method = UNARY[call.method as keyof typeof UNARY];
    const name = method.localName as keyof typeof client.models;
    const unary = client.models[name] as (request: unknown) => Promise<never>;
    const response = await unary(fromJson(method.input as DescMessage, call.request));
    write({ response: json(method.output as DescMessage, response) });
  }
}

function json<M extends DescMessage>(schema: M, message: MessageShape<M>): JsonValue {
  return toJson(schema, message);
}

function ending(error: mlxpool.MlxpoolError): unknown {
  return {
    code: mlxpool.Code[error.code],
    reason: error.reason,
    message: error.message,
    metadata: error.metadata,
    field_violations: error.fieldViolations,
    retry_after_s: error.retryAfterMs === undefined ? null : error.retryAfterMs / 1000,
  };
}
