// What an answer cost: one line under it, and the same in words for who opens it.

export function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || unit === "GiB") return `${unit === "B" ? n : n.toFixed(1)} ${unit}`;
    n /= 1024;
  }
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
// rounded down: 100% is said only when nothing missed
const percent = (part, whole) => `${Math.floor((100 * part) / whole)}%`;
const number = (n) => n.toLocaleString("en");

export function line(usage) {
  const cost = usage.receipt;
  const kinds = [`${cost.tokens_big} big`];
  if (cost.mode !== "exact" && cost.mode !== "auto") kinds.push(`${cost.tokens_little} little`);
  if (cost.mode === "big-little") kinds.push(`${cost.tokens_fallback} fallback`);
  const parts = [kinds.join(" · ")];
  const onDevice = cost.device_hits + cost.device_misses;
  if (onDevice) parts.push(`device ${percent(cost.device_hits, onDevice)} hits`);
  if (cost.bytes_uploaded) parts.push(`${bytes(cost.bytes_uploaded)} uploaded`);
  const asked = cost.expert_hits + cost.expert_misses;
  if (asked) parts.push(`${percent(cost.expert_hits, asked)} hits`, `${bytes(cost.bytes_read)} read`, `${duration(cost.stall_ms)} stalled`);
  if (cost.loss && cost.loss.budget !== null) parts.push(`KL ${cost.loss.estimate.toPrecision(3)} of ${cost.loss.budget}`);
  parts.push(`${usage.tokens_per_second.toFixed(1)} tok/s`);
  return parts.join(" | ");
}

// pairs of a name and a sentence; `meta` is the model's of /v1/models
export function words(usage, meta) {
  const cost = usage.receipt;
  const all = `all ${cost.n_expert_used} experts`;
  const tokens = [`${cost.tokens_big} with ${cost.n_expert_used ? all : "the whole model"}`];
  if (cost.tokens_little) tokens.push(`${cost.tokens_little} with ${cost.little_k}`);
  if (cost.tokens_fallback) tokens.push(`${cost.tokens_fallback} first with ${cost.little_k}, then with all, for the model was unsure`);
  const found = [["Tokens", tokens.join("; ")]];
  const onDevice = cost.device_hits + cost.device_misses;
  if (onDevice) {
    const uploaded = `${bytes(cost.bytes_uploaded)} uploaded, which took ${duration(cost.upload_stall_ms)} of waiting`;
    found.push(["On the device", `${percent(cost.device_hits, onDevice)} of ${number(onDevice)} experts asked for were there; ${uploaded}`]);
  }
  if (cost.loss && cost.loss.budget !== null) {
    const { estimate, budget, audited_tokens: audited } = cost.loss;
    found.push(["Given up", `a divergence of ${estimate.toPrecision(3)} nats a token, as estimated, of ${budget}; ${audited} ${audited === 1 ? "token was" : "tokens were"} run exactly as well to know it`]);
  }
  const asked = cost.expert_hits + cost.expert_misses;
  if (!asked) return found;
  const ahead = cost.prefetch_wasted_bytes ? `; ${bytes(cost.prefetch_wasted_bytes)} of it ahead and not needed` : "";
  found.push(["Read from the file", `${bytes(cost.bytes_read)}, which took ${duration(cost.stall_ms)} of waiting${ahead}`]);
  const one = meta.n_expert && meta.n_layer_moe ? meta.expert_bytes / (meta.n_expert * meta.n_layer_moe) : 0;
  const saved = one ? `: about ${bytes(cost.expert_hits * one)} that were not read` : "";
  found.push(["In memory already", `${percent(cost.expert_hits, asked)} of ${number(asked)} experts asked for${saved}`]);
  if (cost.resident_bytes_peak && meta.expert_bytes) {
    const share = Math.min(100, Math.round((100 * cost.resident_bytes_peak) / meta.expert_bytes));
    found.push(["Memory for experts", `${bytes(cost.resident_bytes_peak)} at most, ${share}% of the model's ${bytes(meta.expert_bytes)}`]);
  }
  return found;
}
