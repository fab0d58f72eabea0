import { access, ask, events } from "/api.js";
import { unwatch, watch } from "/map.js";
import { render } from "/markdown.js";
import { bytes, line, words } from "/receipt.js";

const $ = (id) => document.getElementById(id);
const turns = []; // {role, content, reasoning_content}; an answer that failed before its first word has failed: true
let running = null; // the AbortController of the answer being made
let card = null;

// the server

const RETRY_MS = 3000;
let retry = 0;

function askForKey() {
  $("key-row").hidden = false;
  $("key").focus();
}

async function connect() {
  clearTimeout(retry);
  try {
    card = (await (await ask("/v1/models")).json()).data[0];
  } catch (error) {
    notice(error.lost ? "No connection to the server: trying again." : error.message);
    if (error.status === 401) askForKey();
    else retry = setTimeout(connect, RETRY_MS);
    return;
  }
  notice(card.meta.chats ? "" : "This model makes embeddings and does not chat: see /v1/embeddings.");
  $("send").disabled = !card.meta.chats;
  $("model").textContent = card.meta.name || card.id;
  $("model").title = `${card.id}: ${card.meta.architecture}, ${card.meta.quantization}, context ${card.meta.n_ctx}`;
  document.title = `${card.id} - mobile-gguf`;
  const chosen = $("mode").value || card.meta.mode;
  $("mode").replaceChildren(...card.meta.modes.map((mode) => new Option(mode, mode, false, mode === chosen)));
  $("mode").parentElement.hidden = false;
  $("mode").disabled = card.meta.modes.length < 2;
  introduce(card.meta);
  watchMap();
}

// for who sees such a model for the first time
function introduce(meta) {
  const { n_expert: n, n_expert_used: k, n_layer_moe: layers, ram_budget_bytes: budget, expert_bytes: all } = meta;
  const inMemory = budget === null ? "" : budget < all ? ` At most ${bytes(budget)} of them are in memory at once; the rest is read when a token needs it.` : " All of them may stay in memory.";
  $("facts").textContent = n ? `${bytes(meta.file_bytes)}, of which ${bytes(all)} are experts: ${n} in each of ${layers} layers, and a token uses ${k} of them.${inMemory}` : "";
  $("modes").textContent = meta.modes.length > 1 ? `Mode exact uses all ${k}, little ${meta.little_k}, big-little ${meta.little_k} and then all ${k} where the model is unsure, auto all but missing ones that it may do without.` : "";
}

async function watchMap() {
  if ($("side").hidden || !card) unwatch();
  else if (await watch(card.meta)) {
    clearTimeout(retry);
    retry = setTimeout(connect, RETRY_MS);
  }
}

function toggleMap() {
  $("side").hidden = !$("side").hidden;
  $("show-map").setAttribute("aria-expanded", !$("side").hidden);
  watchMap();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// the conversation

const follows = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };
let atEnd = true;
$("log").addEventListener("scroll", () => { atEnd = follows(); });
// a keyboard or the map takes room: the last words stay in sight
new ResizeObserver(() => atEnd && toEnd()).observe($("log"));

function addTurn(role, content) {
  $("hello").hidden = true;
  const node = document.createElement("article");
  node.className = `turn ${role}`;
  node.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  const text = document.createElement("div");
  text.className = "text";
  const foot = document.createElement("div");
  foot.className = "foot";
  node.append(text, ...(role === "user" ? [] : [foot]));
  if (role === "user") text.textContent = content;
  $("log").append(node);
  toEnd();
  return { text, foot, node };
}

function span(text, name = "") {
  const node = document.createElement("span");
  node.textContent = text;
  node.className = name;
  return node;
}

// what has not changed stays, with what is selected and scrolled in it
function update(box, fragment) {
  const old = [...box.childNodes];
  const fresh = [...fragment.childNodes];
  let same = 0;
  while (same < old.length && same < fresh.length && old[same].isEqualNode(fresh[same])) same++;
  old.slice(same).forEach((node) => node.remove());
  box.append(...fresh.slice(same));
}

// what the model thought, folded
function thoughtsBox() {
  const node = document.createElement("details");
  node.className = "thoughts";
  const summary = document.createElement("summary");
  summary.textContent = "Thoughts";
  const text = document.createElement("div");
  node.append(summary, text);
  return { node, show: (said) => update(text, render(said)) };
}

// the receipt as a line, which opens to the same in words
function costBox() {
  const node = document.createElement("details");
  node.className = "cost";
  node.addEventListener("toggle", () => atEnd && toEnd());
  const summary = document.createElement("summary");
  summary.title = "What this answer cost, in words";
  const text = span("", "receipt");
  summary.append(text);
  const list = document.createElement("dl");
  node.append(summary, list);
  return {
    node,
    show(usage) {
      text.textContent = line(usage);
      list.replaceChildren(...words(usage, card.meta).flatMap(([name, said]) => {
        const pair = [document.createElement("dt"), document.createElement("dd")];
        pair[0].textContent = name;
        pair[1].textContent = said;
        return pair;
      }));
    },
  };
}

// what the model is to read: an answer that failed is left out together with its question
function conversation() {
  return turns.filter((turn, i) => !turn.failed && !turns[i + 1]?.failed).map(({ role, content, reasoning_content: thought }) => (thought ? { role, content, reasoning_content: thought } : { role, content }));
}

async function answer() {
  const shown = addTurn("assistant", "");
  const cost = costBox();
  const state = span("Waiting for the first word …", "state");
  shown.foot.append(state);
  shown.text.classList.add("wait");
  const messages = conversation();
  const made = { role: "assistant", content: "", reasoning_content: "" };
  const thoughts = thoughtsBox();
  turns.push(made);
  let cut = false;
  let trouble = null;
  let painted = true;
  const paint = () => {
    const follow = follows();
    if (made.reasoning_content) {
      if (!thoughts.node.isConnected) shown.node.prepend(thoughts.node);
      thoughts.show(made.reasoning_content);
      state.textContent = "Thinking …";
    }
    update(shown.text, render(made.content));
    painted = true;
    if (follow) toEnd();
  };
  const mine = new AbortController();
  running = mine;
  busy(true);
  notice("");
  try {
    const body = { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    if ($("mode").value) body.mode = $("mode").value;
    const stream = events("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: mine.signal });
    for await (const chunk of stream) {
      const choice = chunk.choices[0];
      made.content += choice?.delta?.content ?? "";
      made.reasoning_content += choice?.delta?.reasoning_content ?? "";
      if (chunk.usage) {
        cost.show(chunk.usage);
        if (!cost.node.isConnected) state.replaceWith(cost.node);
      }
      cut = cut || choice?.finish_reason === "length";
      if (painted) {
        painted = false;
        requestAnimationFrame(paint);
      }
    }
  } catch (error) {
    trouble = error;
  }
  if (running === mine) {
    running = null;
    busy(false);
  }
  if (!shown.node.isConnected) return; // the conversation was cleared meanwhile
  const follow = follows();
  paint();
  state.remove();
  shown.text.classList.remove("wait");
  made.failed = Boolean(trouble) && !made.content;
  if (trouble) shown.foot.prepend(ending(trouble, made));
  if (cut) shown.foot.append(span("Cut at the token limit.", "bad"));
  shown.foot.append(againButton(made.failed));
  if (follow) toEnd();
  if (trouble?.status === 401) askForKey();
  if (trouble?.lost) connect();
}

function ending(trouble, made) {
  if (trouble.name === "AbortError") return span(made.content ? "Stopped." : "Stopped before the first word.", "end");
  const node = span(trouble.message, "end bad");
  node.setAttribute("role", "alert");
  return node;
}

function againButton(failed) {
  document.querySelectorAll(".again").forEach((old) => old.remove());
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = failed ? "Try again" : "Regenerate";
  again.title = "Answer again (Alt+R)";
  again.className = "again";
  again.addEventListener("click", regenerate);
  return again;
}

function busy(is) {
  $("send").textContent = is ? "Stop" : "Send";
  $("send").classList.toggle("stop", is);
  $("send").title = is ? "Stop the answer (Esc)" : "";
  $("log").setAttribute("aria-busy", is);
}

function send() {
  const text = $("prompt").value.trim();
  if (running || !text || $("send").disabled) return;
  $("prompt").value = "";
  grow();
  turns.push({ role: "user", content: text });
  addTurn("user", text);
  answer();
}

function regenerate() {
  if (running || turns.at(-1)?.role !== "assistant") return;
  turns.pop();
  $("log").lastElementChild.remove();
  answer();
}

function clearChat() {
  running?.abort();
  turns.length = 0;
  document.querySelectorAll(".turn").forEach((node) => node.remove());
  $("hello").hidden = false;
  $("prompt").focus();
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

// keys and buttons

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("prompt").value) {
    const last = turns.findLast((turn) => turn.role === "user");
    if (last) {
      event.preventDefault();
      $("prompt").value = last.content;
      grow();
    }
  }
});
$("prompt").addEventListener("input", grow);
$("key").addEventListener("change", () => {
  access.key = $("key").value.trim();
  sessionStorage.setItem("key", access.key);
  connect();
});
$("key").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    event.preventDefault();
    $("key").blur();
    $("prompt").focus();
  }
});
$("clear").addEventListener("click", clearChat);
$("show-map").addEventListener("click", toggleMap);
$("log").addEventListener("click", async (event) => {
  if (!event.target.classList.contains("copy")) return;
  try {
    await navigator.clipboard.writeText(event.target.closest(".code").querySelector("code").textContent);
    event.target.textContent = "Copied";
  } catch {
    event.target.textContent = "Not allowed";
  }
  setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (!event.altKey || event.ctrlKey || event.metaKey) return;
  const action = { KeyN: clearChat, KeyM: toggleMap, KeyR: regenerate }[event.code];
  if (action) {
    event.preventDefault();
    action();
  }
});

if (window.innerWidth <= 760) {
  $("side").hidden = true;
  $("show-map").setAttribute("aria-expanded", false);
}
access.key = $("key").value = sessionStorage.getItem("key") ?? "";
const health = await ask("/health").then((response) => response.json()).catch(() => null);
const needsKey = health?.needs_key ?? false;
$("key-row").hidden = !needsKey;
if (needsKey && !$("key").value) {
  notice("");
  $("key").focus();
} else connect();
