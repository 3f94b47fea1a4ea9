/** Short ways to write requests. What is left out has the model's or the server's default. */

import { create, type MessageInitShape } from "@bufbuild/protobuf";

import {
  type ChatMessage,
  ChatMessageSchema,
  type GenerateRequestSchema,
  type LoadModelRequestSchema,
  type PromptSchema,
  Role,
} from "./gen/mlxpool/v1/model_service_pb.js";

export type GenerateInit = MessageInitShape<typeof GenerateRequestSchema>;
export type LoadModelInit = MessageInitShape<typeof LoadModelRequestSchema>;
type PromptInit = MessageInitShape<typeof PromptSchema>;

/** The prompt of a conversation; a model's answer (`finished.message`) is a message, too. */
export function chat(...messages: ChatMessage[]): PromptInit {
  return { input: { case: "chat", value: { messages } } };
}

/** A prompt that no template changes. */
export function text(prompt: string): PromptInit {
  return { input: { case: "text", value: prompt } };
}

export const system = (content: string): ChatMessage => message(Role.SYSTEM, content);
export const user = (content: string): ChatMessage => message(Role.USER, content);
export const assistant = (content: string): ChatMessage => message(Role.ASSISTANT, content);

/** The answer to the tool call with that id. */
export function toolResult(toolCallId: string, content: string): ChatMessage {
  return { ...message(Role.TOOL, content), toolCallId };
}

function message(role: Role, content: string): ChatMessage {
  const part = { part: { case: "text" as const, value: content } };
  return create(ChatMessageSchema, { role, content: [part] });
}
