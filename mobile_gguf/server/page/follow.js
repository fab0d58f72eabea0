// The expert map as the server tells it, to one page for all: a browser has six connections to a server for all its
// windows together, and a map that each of them followed would leave none for answers. Who follows tells the others;
// the first that hears nobody does it.

import { events } from "/api.js";
import { newId } from "/dom.js";

const PATH = "/v1/experts?stream=true";
const NAME = "mobile-gguf map";
const ASKED_MS = 200; // until who follows has answered
const ALIVE_MS = 1500; // how often it says that it is there
const SILENT_MS = 3 * ALIVE_MS; // after which it is not

// `onMap` with each map until `signal` ends it; whether the server was lost
export function follow(onMap, signal) {
  return new Promise((resolve) => new Follower(onMap, signal, resolve));
}

class Follower {
  #id = newId();
  #channel = new BroadcastChannel(NAME);
  #onMap;
  #resolve;
  #asking = null; // an AbortController while this page is the one that asks the server
  #last = null;
  #timer = 0;
  #isOver = false;

  constructor(onMap, signal, resolve) {
    this.#onMap = onMap;
    this.#resolve = resolve;
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    signal.addEventListener("abort", () => this.#end(false));
    this.#channel.postMessage({ kind: "who" });
    this.#waitFor(ASKED_MS);
  }

  // not all at once: the first one tells the others
  #waitFor(ms) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#ask(), ms * (1 + Math.random()));
  }

  #tell = () => this.#channel.postMessage({ kind: "map", id: this.#id, map: this.#last });

  #hear({ kind, id, map }) {
    if (kind === "who" && this.#asking) this.#tell();
    else if (kind === "bye" && !this.#asking) this.#waitFor(ASKED_MS);
    else if (kind === "lost") this.#end(true);
    else if (kind === "map" && !(this.#asking && id > this.#id)) {
      this.#asking?.abort(); // two began at once
      this.#asking = null;
      this.#waitFor(SILENT_MS);
      if (map) this.#onMap(map);
    }
  }

  async #ask() {
    const mine = new AbortController();
    this.#asking = mine;
    this.#tell();
    const alive = setInterval(this.#tell, ALIVE_MS);
    try {
      for await (const map of events(PATH, { signal: mine.signal })) {
        this.#last = map;
        this.#onMap(map);
        this.#tell();
      }
    } catch { /* the server is lost, or this page asks no more */ }
    clearInterval(alive);
    if (mine.signal.aborted) return;
    this.#channel.postMessage({ kind: "lost" });
    this.#end(true);
  }

  #end(isLost) {
    if (this.#isOver) return;
    this.#isOver = true;
    clearTimeout(this.#timer);
    if (this.#asking && !isLost) this.#channel.postMessage({ kind: "bye" });
    this.#asking?.abort();
    this.#channel.close();
    this.#resolve(isLost);
  }
}
