// One answer: the request, and its turn as the server's events make it.

import { events } from "/api.js";
import { asRequest } from "/settings.js";
import { parted } from "/thinking.js";

const PATH = "/v1/chat/completions";

// what the model is to read before `turn`: no thoughts, and of what got no words neither answer nor question
export function messages(conversation, turn) {
  const before = conversation.turns.slice(0, conversation.turns.findIndex((one) => one.id === turn.id));
  const said = before.map((one) => (one.role === "user" ? one.content : parted(one).words));
  const isKept = (one, i) => said[i].trim() && (one.role === "assistant" || before[i + 1]?.role !== "assistant" || said[i + 1].trim());
  const kept = before.map(({ role }, i) => ({ role, content: said[i] })).filter((_, i) => isKept(before[i], i));
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
