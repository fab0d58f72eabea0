// Talking to the server: requests, server-sent events, and every failure as one line to show.

export const access = { key: "" };

export const LOST = "The connection to the server was lost.";
export const AWAY = "The server does not answer: is mobile-gguf serve still running?";

export class Failure extends Error {
  constructor(line, { status = 0, lost = false } = {}) {
    super(line);
    this.status = status;
    this.lost = lost;
  }
}

const isAbort = (error) => error.name === "AbortError";

// what the server said in an error object, as a line for people
function failureLine({ message = "", code = "" }, status, after) {
  const text = message.trim().replace(/\s+/g, " ").replace(/: try again later$/, "");
  if (status === 429) return `Busy: ${text}. Try again in ${after || 1} s.`;
  if (status === 401) return code === "no_api_key" ? "This server asks for an API key." : "The API key is wrong.";
  if (status === 504 || code === "timeout") return `Too slow: ${text}.`;
  if (status === 503 || code === "cut" || code === "model_unavailable") return "The server is shutting down.";
  return `${status >= 400 && status < 500 ? "Refused" : "Failed"}: ${text}`;
}

async function refusal(response) {
  let detail = { message: `${response.status} ${response.statusText}` };
  try {
    detail = (await response.json()).error;
  } catch { /* not ours: the status has to do */ }
  const after = Number(response.headers.get("retry-after"));
  return new Failure(failureLine(detail, response.status, after), { status: response.status });
}

export async function ask(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(access.key ? { Authorization: `Bearer ${access.key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new Failure(AWAY, { lost: true });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

const PLACE = /^: place (\d+)$/m;

// the objects of a stream, and {place} of who waits in line; it has to end with [DONE], or with the server's word why not
export async function* events(path, options) {
  const reader = (await ask(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (isAbort(error)) throw error;
      throw new Failure(LOST, { lost: true });
    }
    if (part.done) throw new Failure(LOST, { lost: true });
    const blocks = (rest + part.value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const place = PLACE.exec(block);
      if (place) yield { place: Number(place[1]) };
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(failureLine(event.error, 0, 0));
      yield event;
    }
  }
}
