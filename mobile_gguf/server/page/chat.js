// The conversation that is shown, and the answers that this page makes, to this one and to others.

import { receive } from "/answer.js";
import { Conversations, fresh, titleOf, withSettings, withTitle, withTurn, withTurns } from "/conversations.js";
import { $, newId, notice } from "/dom.js";
import { following, toEnd } from "/scroll.js";
import { parted } from "/thinking.js";
import { TurnView } from "/turns.js";

const KEEP_MS = 500; // how often an answer is stored while it comes
const ALIVE_MS = 4000; // and told to other tabs while it does not

export const chat = {
  card: null, // of the model, from the server
  here: fresh(),
  answers: new Map(), // by conversation: {turn, controller, place} of the answer that this page makes
  store: null,
  onTrouble: () => {}, // an answer ended with an error of the server's
  onChange: () => {}, // what is shown, or runs, is another
};
const views = new Map(); // by turn
let isStored = false; // whether the conversation that is shown was in the store
const ended = new Set(); // answers that are whole, and not stored so yet

export async function begin(onListed) {
  chat.store = await Conversations.open(async (id, wasRemote) => {
    onListed();
    if (wasRemote && id === chat.here.id) await reload();
  }, (line) => {
    $("kept").textContent = line;
    $("kept").hidden = !line;
  });
}

async function reload() {
  const now = await chat.store.read(chat.here.id);
  if (now) show(now);
  else if (isStored) {
    isStored = false;
    notice("This conversation was deleted in another tab: the next message keeps it again.");
  }
}

// the conversation of an id, or a new one
export async function go(id) {
  const now = id ? await chat.store.read(id) : null;
  if (id && !now) notice("This conversation is not here any more.");
  isStored = Boolean(now);
  const { mode } = chat.here.settings;
  show(now ?? { ...fresh(), settings: mode ? { mode } : {} });
  toEnd();
}

function show(conversation) {
  const live = chat.answers.get(conversation.id);
  const turns = conversation.turns.map((turn) => (turn.id === live?.turn.id ? live.turn : turn));
  if (conversation.id !== chat.here.id) $("said").textContent = "";
  chat.here = { ...conversation, turns };
  following(paint);
  chat.onChange();
}

export function paint() {
  const { turns, id } = chat.here;
  const wanted = new Set(turns.map((turn) => turn.id));
  for (const [turn, view] of views) {
    if (!wanted.has(turn)) {
      view.node.remove();
      views.delete(turn);
    }
  }
  let before = $("hello");
  before.hidden = turns.length > 0;
  for (const turn of turns) {
    if (!views.has(turn.id)) views.set(turn.id, new TurnView(turn));
    const { node } = views.get(turn.id);
    if (before.nextElementSibling !== node) before.after(node);
    before = node;
    paintTurn(turn, id);
  }
}

function paintTurn(turn, id) {
  const live = chat.answers.get(id);
  const again = !live && turn === chat.here.turns.at(-1) ? regenerate : null;
  const edit = live || !chat.card?.meta.chats ? null : (text) => replace(turn, text);
  views.get(turn.id)?.paint(turn, live?.turn.id === turn.id ? live : null, { again, edit });
}

export const isBusy = () => chat.answers.has(chat.here.id);
export const stop = () => chat.answers.get(chat.here.id)?.controller.abort();

function newAnswer() {
  const { id, meta } = chat.card;
  const of = { id, n_expert: meta.n_expert, n_layer_moe: meta.n_layer_moe, expert_bytes: meta.expert_bytes };
  return { id: newId(), role: "assistant", content: "", at: Date.now(), of };
}

export function send(text) {
  chat.here.title ||= titleOf(text);
  ask([{ id: newId(), role: "user", content: text }, newAnswer()], []);
}

export function regenerate() {
  const last = chat.here.turns.at(-1);
  if (!isBusy() && chat.card && last?.role === "assistant") ask([newAnswer()], [last.id]);
}

// another question in the place of one, and of all that followed it
function replace(question, text) {
  const { turns, title } = chat.here;
  const at = turns.findIndex((turn) => turn.id === question.id);
  if (isBusy() || at < 0) return;
  if (at === 0 && title === titleOf(question.content)) {
    chat.here.title = titleOf(text);
    chat.store.change(chat.here.id, withTitle(chat.here.title));
  }
  ask([{ id: newId(), role: "user", content: text }, newAnswer()], turns.slice(at).map((turn) => turn.id));
  $("prompt").focus();
}

function ask(added, replaced) {
  const add = withTurns(chat.here, added, replaced);
  const asked = { conversation: chat.here, added, replaced };
  chat.here = add(chat.here);
  isStored = true;
  const live = { id: chat.here.id, turn: added.at(-1), controller: new AbortController(), place: 0, asked };
  chat.store.change(live.id, add).then(() => { live.asked = null; });
  if (location.hash.slice(1) !== live.id) history.replaceState(null, "", `#${live.id}`);
  make(chat.here, live);
}

async function make(conversation, live) {
  const { id, turn } = live;
  chat.answers.set(id, live);
  const isHere = () => chat.here.id === id;
  let kept = Date.now();
  let isKept = true;
  const keep = () => {
    turn.at = kept = Date.now();
    isKept = true;
    return chat.store.change(id, withTurn({ ...turn }), turn.id);
  };
  const timer = setInterval(() => { if (!isKept || Date.now() - kept > ALIVE_MS) keep(); }, KEEP_MS);
  notice("");
  $("said").textContent = "";
  paint();
  toEnd();
  chat.onChange();
  let painted = true;
  const trouble = await receive(conversation, turn, chat.card.meta.modes, live.controller.signal, (place) => {
    live.place = place;
    isKept = false;
    if (!painted || !isHere()) return;
    painted = false;
    requestAnimationFrame(() => {
      painted = true;
      if (isHere() && chat.answers.get(id) === live) following(() => paintTurn(turn, id));
    });
  });
  clearInterval(timer);
  chat.answers.delete(id);
  ended.add(live);
  keep().then(() => ended.delete(live));
  if (isHere()) {
    following(paint);
    // read out once, and not with every word
    $("said").textContent = parted(turn).words;
  }
  chat.onChange();
  if (trouble && turn.end === "failed") chat.onTrouble(trouble);
}

export function setSettings(settings) {
  chat.here.settings = settings;
  if (isStored) chat.store.change(chat.here.id, withSettings(settings));
  chat.onChange();
}

// a page that is left keeps what it has
addEventListener("pagehide", () => {
  for (const live of chat.answers.values()) chat.store.leave(live, { ...live.turn, end: "left", at: Date.now() });
  for (const live of ended) chat.store.leave(live, live.turn);
});
// and one that is looked at again knows how long an answer in another tab said nothing
setInterval(() => { if (!document.hidden && chat.here.turns.some((turn) => turn.role === "assistant" && !turn.end)) paint(); }, 5000);
