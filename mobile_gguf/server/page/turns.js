// How a turn looks: a question, or an answer with what the model thought, why it ended and what it cost.

import { button, copyBy, fit, make, span, update } from "/dom.js";
import { render } from "/markdown.js";
import { line, words } from "/receipt.js";
import { stayAtEnd } from "/scroll.js";
import { parted } from "/thinking.js";

const ABANDONED_MS = 10_000; // a tab that answers says so more often
const LEFT = "The page was left before the end.";

const seconds = (ms) => (ms < 60_000 ? `${(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)} s` : `${Math.round(ms / 60_000)} min`);

function folded(name, summary, ...content) {
  const node = make("details", summary, ...content);
  node.className = name;
  node.addEventListener("toggle", stayAtEnd);
  return node;
}

// the receipt as a line, which opens to the same in words
class Cost {
  #text = span("", "receipt");
  #list = make("dl");
  node;

  constructor() {
    const summary = make("summary", this.#text);
    summary.title = "What this answer cost, in words";
    this.node = folded("cost", summary, this.#list);
  }

  show(usage, meta) {
    this.#text.textContent = line(usage);
    this.#list.replaceChildren(...words(usage, meta).flatMap(([name, said]) => [make("dt", name), make("dd", said)]));
  }
}

class Thoughts {
  #summary = make("summary");
  #text = make("div");
  node;

  constructor() {
    this.#text.className = "text";
    this.node = folded("thoughts", this.#summary, this.#text);
  }

  show(text, open, ms) {
    this.#summary.textContent = `${open ? "Thinking" : "Thought"}${ms ? (open ? `, ${seconds(ms)} so far` : ` for ${seconds(ms)}`) : ""}`;
    update(this.#text, render(text));
  }
}

function endOf({ end, problem, content, thinking }) {
  if (end === "stopped") return [content || thinking ? "Stopped." : "Stopped before the first word.", "end"];
  if (end === "failed") return [problem ?? "Failed.", "end bad"];
  if (end === "left") return [LEFT, "end"];
  if (end === "cut") return ["Cut at the token limit.", "bad"];
  return ["", ""];
}

// what is said of an answer that has no end yet: `live` if this page makes it, else another tab does, or did
function stateOf(turn, live) {
  if (turn.end) return "";
  if (live?.place) return `Waiting in line: ${live.place === 1 ? "next" : `place ${live.place}`} …`;
  if (live) return turn.content || turn.thinking ? "" : "Waiting for the first word …";
  return Date.now() - (turn.at ?? 0) < ABANDONED_MS ? "Another tab answers …" : LEFT;
}

// a question, and the field that it is edited in
class Question {
  #text = make("div");
  #foot = make("div");
  #content;
  #opener;
  #field = null;
  #edit = null; // as `show` was given it last

  constructor(node, turn) {
    this.#text.className = "text";
    this.#text.textContent = this.#content = turn.content;
    this.#foot.className = "foot";
    this.#opener = button("Edit", "Edit this message: what follows it is replaced", () => this.#open());
    node.append(this.#text, this.#foot);
  }

  // `edit` is called with another text, and says whether it was taken; null while none can be
  show(edit) {
    this.#edit = edit;
    if (!this.#field) this.#foot.replaceChildren(...(edit ? [this.#opener] : []));
    else this.#foot.firstElementChild.disabled = !edit;
  }

  #open() {
    const field = (this.#field = make("textarea"));
    field.value = this.#content;
    field.rows = 1;
    field.setAttribute("aria-label", "Edit this message");
    field.addEventListener("input", () => fit(field));
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter" && !event.shiftKey) this.#send();
      else if (event.key === "Escape") this.#close();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.#text.replaceChildren(field);
    this.#text.classList.add("edited");
    this.#foot.replaceChildren(button("Send", "Ask this instead", () => this.#send()), button("Cancel", "Leave it as it is (Esc)", () => this.#close()));
    fit(field);
    field.focus();
  }

  #send() {
    const text = this.#field.value.trim();
    if (text) this.#edit?.(text);
  }

  #close() {
    this.#field = null;
    this.#text.textContent = this.#content;
    this.#text.classList.remove("edited");
    this.show(this.#edit);
    this.#opener.focus();
  }
}

export class TurnView {
  node = make("article");
  #text = make("div");
  #foot = make("div");
  #question = null;
  #copy = null;
  #said = "";
  #cost = null;
  #thoughts = null;
  #state = span("", "state");
  #end = null;
  #again = null;
  #painted = "";

  constructor(turn) {
    this.node.className = `turn ${turn.role}`;
    this.node.setAttribute("aria-label", turn.role === "user" ? "You" : "Answer");
    if (turn.role === "user") {
      this.#question = new Question(this.node, turn);
      return;
    }
    this.#text.className = "text";
    this.#foot.className = "foot";
    this.node.append(this.#text, this.#foot);
  }

  // `live`: of the answer while this page makes it; `again` is called for another answer, `edit` with another text of
  // a question, null where there is none
  paint(turn, live, { again, edit }) {
    if (this.#question) {
      this.#question.show(edit);
      return;
    }
    const { thoughts, words: said, open } = parted(turn);
    if (said !== this.#painted) update(this.#text, render(said));
    this.#painted = said;
    this.#text.classList.toggle("wait", Boolean(live));
    if (thoughts) {
      if (!this.#thoughts) this.#text.before((this.#thoughts = new Thoughts()).node);
      this.#thoughts.show(thoughts, open && Boolean(live), turn.thought_ms);
    }
    this.#said = said;
    this.#paintFoot(turn, live, again);
  }

  #paintFoot(turn, live, again) {
    const state = stateOf(turn, live);
    if (this.#state.textContent !== state) this.#state.textContent = state;
    const [text, name] = endOf(turn);
    if (text !== (this.#end?.textContent ?? "")) {
      this.#end = text ? span(text, name) : null;
      if (name === "end bad") this.#end.setAttribute("role", "alert");
    }
    if (turn.usage) this.#showCost(turn);
    if (!again) this.#again = null;
    else {
      this.#again ??= button("", "Answer again (Alt+R)", again);
      this.#again.className = "again";
      this.#again.textContent = turn.content || turn.thinking || turn.end === "done" ? "Regenerate" : "Try again";
    }
    if (turn.end && this.#said) this.#copy ??= copyBy("Copy", "Copy this answer as Markdown", () => this.#said);
    const isCut = turn.end === "cut";
    const parts = [isCut ? null : this.#end, state ? this.#state : null, this.#cost?.node, isCut ? this.#end : null, this.#copy, this.#again];
    const wanted = parts.filter(Boolean);
    const same = wanted.length === this.#foot.childNodes.length && wanted.every((node, i) => node === this.#foot.childNodes[i]);
    if (!same) this.#foot.replaceChildren(...wanted);
  }

  #showCost({ usage, of }) {
    const cost = this.#cost ?? new Cost();
    try {
      cost.show(usage, of ?? {});
      this.#cost = cost;
    } catch { /* a file's receipt may be of another version: the answer is shown without */ }
  }
}
