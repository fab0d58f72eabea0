// Conversations as a file, out of the browser and into it.

import { newId } from "/dom.js";
import { cleaned } from "/settings.js";

const FORMAT = "mobile-gguf conversations";
const VERSION = 1;

export function download(conversations) {
  const text = JSON.stringify({ format: FORMAT, version: VERSION, conversations }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `conversations-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const isText = (value) => typeof value === "string";
const isTime = (value) => Number.isFinite(value) && value > 0 && value < 8.64e15;

function turnFrom(given) {
  if (!given || !["user", "assistant"].includes(given.role) || !isText(given.content)) return null;
  const turn = { id: isText(given.id) ? given.id.slice(0, 40) : newId(), role: given.role, content: given.content };
  if (given.role === "user") return turn;
  if (isText(given.thinking)) turn.thinking = given.thinking;
  if (Number.isFinite(given.thought_ms)) turn.thought_ms = given.thought_ms;
  for (const name of ["end", "problem"]) if (isText(given[name])) turn[name] = given[name].slice(0, 500);
  turn.end ??= "done";
  for (const name of ["usage", "of"]) if (given[name] && typeof given[name] === "object") turn[name] = given[name];
  return turn;
}

function conversationFrom(given, at) {
  const place = `conversation ${at + 1}`;
  if (!given || typeof given !== "object" || !Array.isArray(given.turns)) throw new Error(`${place} has no turns`);
  const turns = given.turns.map((turn, i) => {
    const read = turnFrom(turn);
    if (!read) throw new Error(`turn ${i + 1} of ${place} is none`);
    return read;
  });
  const ids = new Set(turns.map((turn) => turn.id));
  if (ids.size < turns.length) turns.forEach((turn) => { turn.id = newId(); });
  return {
    id: isText(given.id) && /^\w{1,40}$/.test(given.id) ? given.id : newId(),
    title: isText(given.title) ? given.title.slice(0, 200) : "",
    created: isTime(given.created) ? given.created : Date.now(),
    changed: isTime(given.changed) ? given.changed : Date.now(),
    settings: cleaned(given.settings),
    turns,
  };
}

// the conversations of such a file; an Error whose message is a line that says why there are none
export function readFile(text) {
  let given;
  try {
    given = JSON.parse(text);
  } catch {
    throw new Error("Not imported: the file is not JSON.");
  }
  if (given?.format !== FORMAT || !Array.isArray(given.conversations)) {
    throw new Error("Not imported: the file holds no conversations of this page.");
  }
  if (given.version > VERSION) throw new Error("Not imported: the file is of a later version of this page.");
  try {
    return given.conversations.map(conversationFrom);
  } catch (error) {
    throw new Error(`Not imported: ${error.message}.`);
  }
}
