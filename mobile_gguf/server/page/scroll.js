// The conversation's end stays in sight for who is there, and who reads above is left there.

import { $ } from "/dom.js";

const log = $("log");
let atEnd = true;

export const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
export const toEnd = () => { log.scrollTop = log.scrollHeight; };
export const stayAtEnd = () => { if (atEnd) toEnd(); };

// run what changes the conversation's height
export function following(change) {
  const follow = isAtEnd();
  change();
  if (follow) toEnd();
}

log.addEventListener("scroll", () => { atEnd = isAtEnd(); });
// a keyboard or the map takes room: the last words stay in sight
new ResizeObserver(stayAtEnd).observe(log);
