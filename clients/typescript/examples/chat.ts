/**
 * A conversation with a model: node dist/examples/chat.js [--target HOST:PORT] [--model NAME]
 *
 * Ctrl-C stops an answer, Ctrl-D leaves.
 */

import { createInterface } from "node:readline";
import { parseArgs } from "node:util";

import { type ChatMessage, chat, Client, Code, deltaText, MlxpoolError, user } from "../src/index.js";

const { values } = parseArgs({
  options: {
    target: { type: "string", default: "127.0.0.1:50051" },
    model: { type: "string", default: "demo" },
    "max-tokens": { type: "string", default: "500" },
    ca: { type: "string" },
  },
});
const client = new Client(values.target, {
  tls: values.ca === undefined ? undefined : { ca: values.ca },
  apiKey: process.env["MLXPOOL_API_KEY"],
});
await client.waitUntilReady(10_000);

let messages: ChatMessage[] = [];
process.stdout.write("> ");
for await (const line of createInterface({ input: process.stdin })) {
  const asked = [...messages, user(line)];
  const answer = await say(asked);
  if (answer !== undefined) {
    messages = [...asked, answer];
  }
  process.stdout.write("> ");
}
client.close();

/** Prints an answer while it comes, and returns it; undefined when Ctrl-C stopped it. */
async function say(asked: ChatMessage[]): Promise<ChatMessage | undefined> {
  const controller = new AbortController();
  const stop = () => controller.abort();
  process.once("SIGINT", stop);
  try {
    const request = {
      model: values.model,
      prompt: chat(...asked),
      sampling: { temperature: 0 },
      stop: { maxTokens: Number(values["max-tokens"]) },
    };
    for await (const event of client.generate(request, { signal: controller.signal })) {
      if (event.case === "delta") {
        process.stdout.write(deltaText(event.value));
      } else if (event.case === "finished") {
        return event.value.message;
      }
    }
  } catch (error) {
    if (!(error instanceof MlxpoolError && error.code === Code.CANCELLED)) {
      throw error;
    }
  } finally {
    process.off("SIGINT", stop);
    process.stdout.write("\n");
  }
  return undefined;
}
