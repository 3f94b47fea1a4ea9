/** The events of the streams: `switch (event.case)` tells them apart. */

import type {
  ChatMessage,
  GenerateResponse,
  GenerationDelta,
  LoadModelResponse,
} from "./gen/mlxpool/v1/model_service_pb.js";

type Known<E extends { case: string | undefined }> = Exclude<E, { case: undefined }>;

/** One "started", any "progress" and "delta", then exactly one "finished"; `value` has the facts. */
export type GenerationEvent = Known<GenerateResponse["event"]>;

/** Any "progress", then exactly one "finished". */
export type LoadEvent = Known<LoadModelResponse["event"]>;

/** A delta's text; empty for thoughts, tool calls, and deltas that have only ids. */
export function deltaText(delta: GenerationDelta): string {
  return delta.content.case === "text" ? delta.content.value : "";
}

/** A message's text, without thoughts and tool calls. */
export function messageText(message: ChatMessage | undefined): string {
  const parts = message?.content ?? [];
  return parts.map(({ part }) => (part.case === "text" ? part.value : "")).join("");
}
