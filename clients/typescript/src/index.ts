export { Client, DEFAULT_TARGET } from "./client.js";
export type { CallOptions, ClientOptions } from "./client.js";
export type { GenerationEvent, LoadEvent } from "./events.js";
export { deltaText, messageText } from "./events.js";
export type { FieldViolation } from "./errors.js";
export { Code, IncompleteStreamError, MlxpoolError } from "./errors.js";
export { assistant, chat, system, text, toolResult, user } from "./requests.js";
export type { GenerateInit, LoadModelInit } from "./requests.js";
export type { TlsFiles } from "./security.js";
// The contract's messages and enums, as they are generated.
export * from "./gen/mlxpool/v1/model_service_pb.js";
export * from "./gen/mlxpool/v1/memory_service_pb.js";
