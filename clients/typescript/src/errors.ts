/** From a gRPC status and its google.rpc details to the error that a call throws. */

import { fromBinary, type Message } from "@bufbuild/protobuf";
import { anyUnpack } from "@bufbuild/protobuf/wkt";
import type { GenMessage } from "@bufbuild/protobuf/codegenv2";
import { type ServiceError, status as Code } from "@grpc/grpc-js";

import {
  BadRequestSchema,
  ErrorInfoSchema,
  RetryInfoSchema,
} from "./gen/google/rpc/error_details_pb.js";
import { type Status, StatusSchema } from "./gen/google/rpc/status_pb.js";

/** gRPC's status codes, by name and number. */
export { Code };

const DOMAIN = "mlxpool";

/** What is wrong with one field of a request; `field` is its path in the contract's names. */
export interface FieldViolation {
  readonly field: string;
  readonly description: string;
}

/** A call failed. The fields are the facts that the server sent, empty where it sent none. */
export class MlxpoolError extends Error {
  override readonly name: string = "MlxpoolError";
  /** The gRPC status. */
  readonly code: Code;
  /** The stable reason of the contract, such as "MODEL_NOT_FOUND". */
  readonly reason: string;
  /** The facts behind the reason; requiredBytes and the like are decimal texts. */
  readonly metadata: Readonly<Record<string, string>>;
  readonly fieldViolations: readonly FieldViolation[];
  /** Milliseconds after which the server suggests to come back; undefined = not said. */
  readonly retryAfterMs: number | undefined;

  constructor(message: string, code: Code, details?: Status, options?: ErrorOptions) {
    super(message, options);
    const info = find(details, ErrorInfoSchema, (found) => found.domain === DOMAIN);
    const delay = find(details, RetryInfoSchema)?.retryDelay;
    this.code = code;
    this.reason = info?.reason ?? "";
    this.metadata = { ...info?.metadata };
    this.fieldViolations = (find(details, BadRequestSchema)?.fieldViolations ?? []).map(
      ({ field, description }) => ({ field, description }),
    );
    this.retryAfterMs = delay && Number(delay.seconds) * 1000 + delay.nanos / 1e6;
  }
}

/** The stream ended with status OK and without its last event: treat the output as cut off. */
export class IncompleteStreamError extends MlxpoolError {
  override readonly name = "IncompleteStreamError";

  constructor() {
    super("the stream ended without its finished event", Code.OK);
  }
}

/** The typed error for what gRPC threw; with the reason of a signal that cancelled the call. */
export function typedError(failure: unknown, signal?: AbortSignal): unknown {
  if (failure instanceof MlxpoolError || !isServiceError(failure)) {
    return failure;
  }
  if (failure.code === Code.CANCELLED && signal?.aborted) {
    return cancelled(signal);
  }
  return new MlxpoolError(failure.details, failure.code, detailsOf(failure), { cause: failure });
}

export function cancelled(signal: AbortSignal): MlxpoolError {
  return new MlxpoolError("the call was cancelled", Code.CANCELLED, undefined, {
    cause: signal.reason,
  });
}

function isServiceError(failure: unknown): failure is ServiceError {
  return failure instanceof Error && "code" in failure && "details" in failure;
}

function detailsOf(failure: ServiceError): Status | undefined {
  const [raw] = failure.metadata?.get("grpc-status-details-bin") ?? [];
  try {
    return raw instanceof Uint8Array ? fromBinary(StatusSchema, raw) : undefined;
  } catch {
    // Mangled on the way: the code and the message remain.
    return undefined;
  }
}

function find<M extends Message>(
  status: Status | undefined,
  schema: GenMessage<M>,
  fits: (found: M) => boolean = () => true,
): M | undefined {
  for (const detail of status?.details ?? []) {
    try {
      const found = anyUnpack(detail, schema);
      if (found !== undefined && fits(found)) {
        return found;
      }
    } catch {
      // As above.
    }
  }
  return undefined;
}
