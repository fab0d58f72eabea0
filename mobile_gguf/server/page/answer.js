// One answer: the request, and its turn as the server's events make it.

import { events } from "/api.js";
import { asRequest } from "/settings.js";
import { parted } from "/thinking.js";

const PATH = "/v1/chat/completions";

// a turn as the model reads it later: the chat template says whether its thoughts, which are told apart, are of use then
function asMessage(turn) {
  if (turn.role === "user") return { role: turn.role, content: turn.content };
  const { thoughts, words } = parted(turn);
  return { role: turn.role, content: words, ...(thoughts && { reasoning_content: thoughts }) };
}

// what the model is to read before `turn`; of what got no words neither answer nor question
export function messages(conversation, turn) {
  const before = conversation.turns.slice(0, conversation.turns.findIndex((one) => one.id === turn.id)).map(asMessage);
  const hasWords = (message) => message?.content.trim();
  const isKept = (message, i) => hasWords(message) && (message.role === "assistant" || before[i + 1]?.role !== "assistant" || hasWords(before[i + 1]));
  const kept = before.filter(isKept);
  const { system } = conversation.settings;
  return system ? [{ role: "system", content: system }, ...kept] : kept;
}

// Fill `turn` until the answer ends, however it does; `onChange(place)` after each event, `place` in the server's line.
// The error it ended with, or null.
export async function receive(conversation, turn, modes, signal, onChange) {
  const body = {
    ...asRequest(conversation.settings, modes),
    messages: messages(conversation, turn),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  let began = 0;
  let end = "done";
  try {
    for await (const event of events(PATH, { method: "POST", body: JSON.stringify(body), signal })) {
      if (event.place !== undefined) {
        onChange(event.place);
        continue;
      }
      const choice = event.choices[0];
      turn.content += choice?.delta?.content ?? "";
      const thought = choice?.delta?.reasoning_content ?? "";
      if (thought) turn.thinking = (turn.thinking ?? "") + thought;
      const { thoughts, words, open } = parted(turn);
      if (thoughts && !began) began = performance.now();
      if (began && (open || !words)) turn.thought_ms = Math.round(performance.now() - began);
      if (event.usage) turn.usage = event.usage;
      if (choice?.finish_reason === "length") end = "cut";
      onChange(0);
    }
  } catch (error) {
    turn.end = error.name === "AbortError" ? "stopped" : "failed";
    if (turn.end === "failed") turn.problem = error.message;
    return error;
  }
  turn.end = end;
  return null;
}
