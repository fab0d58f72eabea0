// Conversations in the browser's database, and what several tabs do to them at once.
//
// Every change is a function of the conversation as it is stored (null if it is not there), applied in a transaction:
// two tabs that write to the same one both have their turns in it. What the browser does not store (no database, no
// room) is remembered as changes that are not made yet: this tab reads as if they were, and tries again with the next.

import { newId } from "/dom.js";

const NAME = "mobile-gguf";
const HEADS = "heads"; // {id, title, created, changed}: what the list shows
const LEFT = "left "; // in localStorage, before the id of a turn
const BODIES = "bodies"; // {id, settings, turns}
const NOT_KEPT = "This browser keeps no conversations here: they end with the page.";
const NOT_STORED = "The browser did not store this conversation: it ends with the page, or export it.";
const NO_ROOM = "The browser has no room for this conversation: export it, or delete others.";

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

const ended = (transaction) => new Promise((resolve, reject) => {
  transaction.oncomplete = () => resolve();
  transaction.onabort = transaction.onerror = () => reject(transaction.error ?? new Error("aborted"));
});

function opened() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore(HEADS, { keyPath: "id" });
    request.result.createObjectStore(BODIES, { keyPath: "id" });
  };
  return done(request);
}

const headOf = ({ id, title, created, changed }) => ({ id, title, created, changed });
const bodyOf = ({ id, settings, turns }) => ({ id, settings, turns });
const isSameHead = (one, other) => one && other && one.title === other.title && one.changed === other.changed;

export class Conversations {
  #database;
  #channel;
  #waiting = new Map(); // by id: {key, change, failed} that are being stored, or could not be
  #onChange;
  #onTrouble;
  #isTroubled = false;

  // `onChange(id, wasRemote)` after every change of any tab, `onTrouble(line)` with what is wrong, "" when it is not
  static async open(onChange, onTrouble) {
    let database = null;
    try {
      database = await opened();
    } catch { /* refused, as in some private windows */ }
    const found = new Conversations(database, onChange, onTrouble);
    await found.#takeLeft();
    return found;
  }

  // A page that is being left has no time for the database: what it had of a turn waits elsewhere for the next page,
  // and what was asked by it, {conversation, added, replaced}, if that is not stored either.
  leave({ id, asked }, turn) {
    try {
      localStorage.setItem(LEFT + turn.id, JSON.stringify({ id, asked, turn }));
    } catch { /* no room there: what was stored last has to do */ }
  }

  async #takeLeft() {
    let left = [];
    try {
      left = Object.keys(localStorage).filter((name) => name.startsWith(LEFT));
    } catch { /* refused like the database */ }
    for (const name of left) {
      const { id, asked, turn } = JSON.parse(localStorage.getItem(name));
      const ask = asked ? withTurns(asked.conversation, asked.added, asked.replaced) : (stored) => stored;
      await this.change(id, (stored) => withTurn(turn)(ask(stored)), turn.id);
      localStorage.removeItem(name);
    }
  }

  constructor(database, onChange, onTrouble) {
    this.#database = database;
    this.#onChange = onChange;
    this.#onTrouble = onTrouble;
    this.#channel = new BroadcastChannel(NAME);
    this.#channel.onmessage = ({ data }) => onChange(data.id, true);
    if (!database) return onTrouble(NOT_KEPT);
    // a later version of the page, in another tab, may want another shape
    database.onversionchange = () => database.close();
  }

  // the heads of all, what changed last at first
  async list() {
    const heads = new Map();
    if (this.#database) {
      const stored = await done(this.#database.transaction(HEADS).objectStore(HEADS).getAll()).catch(() => []);
      for (const head of stored) heads.set(head.id, head);
    }
    for (const id of this.#waiting.keys()) {
      const now = await this.read(id);
      if (now) heads.set(id, headOf(now));
      else heads.delete(id);
    }
    return [...heads.values()].sort((one, other) => other.changed - one.changed);
  }

  async read(id) {
    let stored = null;
    if (this.#database) {
      const transaction = this.#database.transaction([HEADS, BODIES]);
      const parts = [HEADS, BODIES].map((name) => done(transaction.objectStore(name).get(id)));
      const [head, body] = await Promise.all(parts).catch(() => []);
      if (head && body) stored = { ...head, ...body };
    }
    return this.#changed(id, stored);
  }

  #changed(id, stored) {
    return (this.#waiting.get(id) ?? []).reduce((now, { change }) => change(now), stored);
  }

  // Apply `change` to a conversation; null from it deletes. Of changes with the same `key` that could not be stored the
  // last one counts.
  async change(id, change, key = null) {
    const known = this.#waiting.get(id) ?? [];
    const failed = known.filter((one) => one.failed && (key === null || one.key !== key));
    const flying = known.filter((one) => !one.failed);
    const mine = [...failed, { key, change }];
    this.#waiting.set(id, [...flying, ...mine]);
    for (const one of mine) one.failed = !this.#database;
    if (this.#database) {
      try {
        await this.#store(id, mine);
        const later = (this.#waiting.get(id) ?? []).filter((one) => !mine.includes(one));
        if (later.length) this.#waiting.set(id, later);
        else this.#waiting.delete(id);
        if (this.#isTroubled && ![...this.#waiting.values()].flat().some((one) => one.failed)) this.#tell("");
      } catch (error) {
        for (const one of mine) one.failed = true;
        this.#tell(error.name === "QuotaExceededError" ? NO_ROOM : NOT_STORED);
      }
    }
    this.#onChange(id, false);
    this.#channel.postMessage({ id });
  }

  #tell(line) {
    this.#isTroubled = Boolean(line);
    this.#onTrouble(line);
  }

  async #store(id, changes) {
    const transaction = this.#database.transaction([HEADS, BODIES], "readwrite");
    const end = ended(transaction);
    const [heads, bodies] = [HEADS, BODIES].map((name) => transaction.objectStore(name));
    const reading = Promise.all([done(heads.get(id)), done(bodies.get(id))]);
    const writing = reading.then(([head, body]) => {
      const now = changes.reduce((so, { change }) => change(so), head && body ? { ...head, ...body } : null);
      if (!now) {
        heads.delete(id);
        bodies.delete(id);
        return;
      }
      if (!isSameHead(head, now)) heads.put(headOf(now));
      bodies.put(bodyOf(now));
    });
    await Promise.all([end, writing]);
  }
}

// changes

// what is stored with turns added, and without those that they replace; a conversation that is not there is made
export const withTurns = (mine, added, replaced = []) => (stored) => {
  const gone = new Set([...replaced, ...added.map((turn) => turn.id)]);
  const base = stored ?? { ...mine, turns: mine.turns.filter((turn) => !gone.has(turn.id)) };
  return { ...base, changed: Date.now(), turns: [...base.turns.filter((turn) => !gone.has(turn.id)), ...added] };
};

// a turn as it is now; one that another tab has replaced meanwhile stays gone
export const withTurn = (now) => (stored) => stored && {
  ...stored, turns: stored.turns.map((turn) => (turn.id === now.id ? now : turn)),
};

export const withTitle = (title) => (stored) => stored && { ...stored, title };
export const withSettings = (settings) => (stored) => stored && { ...stored, settings };
export const without = () => null;
export const restored = (mine) => (stored) => stored ?? mine;

export const fresh = () => ({ id: newId(), title: "", created: Date.now(), changed: Date.now(), settings: {}, turns: [] });

export function titleOf(question) {
  const line = question.trim().split("\n")[0].trim();
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}
