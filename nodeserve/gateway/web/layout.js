"use strict";
// The picture of the layout: the buffer, then pools of workers in the order that a request meets them.

const POOLS = [["mixed", "Mixed"], ["prefill", "Prefill"], ["decode", "Decode"]];
const FULL = 0.95; // of KV blocks: what comes next waits or preempts
const pools = new Map(); // role: its parts
const shown = new Map(); // index: a worker's parts

function showLayout(view) {
  say(byId("layout-name"), view.layout);
  showBuffer(view);
  for (const [role, name] of POOLS) {
    const members = view.workers.filter((worker) => worker.role === role);
    if (members.length) showPool(role, name, members, view);
    else forgetPool(role);
  }
  for (const [index, parts] of shown) {
    if (!view.workers.some((worker) => worker.index === index)) {
      parts.node.remove();
      shown.delete(index);
    }
  }
}

function poolOf(role, name) {
  if (!pools.has(role)) {
    const parts = { sum: make("span", "dim"), list: make("ul", "workers") };
    parts.node = make("div", "pool", make("h3", "", make("span", "", name), parts.sum), parts.list);
    parts.node.dataset.role = role;
    parts.list.setAttribute("aria-label", `${name} workers`);
    byId("flow").append(parts.node);
    pools.set(role, parts);
  }
  return pools.get(role);
}

function forgetPool(role) {
  pools.get(role)?.node.remove();
  pools.delete(role);
}

function showPool(role, name, members, view) {
  const parts = poolOf(role, name);
  parts.node.style.setProperty("--share", Math.min(4, Math.ceil(members.length / 2)));
  say(parts.sum, poolWords(role, members, view));
  for (const worker of members) showWorker(parts.list, worker, members);
}

function poolWords(role, members, view) {
  if (role === "decode" && known(view.handoff.gb_per_s)) {
    return `handoff ${digits(view.handoff.gb_per_s)} GB/s`;
  }
  return plural(members.length, "worker");
}

// ---- the buffer

let buffer = null;

function showBuffer({ admission }) {
  if (!buffer) {
    buffer = { queued: make("p", "name"), tokens: make("p"), window: make("p"), note: make("p", "note warn") };
    const list = make("div", "buffer", ...Object.values(buffer));
    const node = make("div", "pool", make("h3", "", make("span", "", "Buffer")), list);
    node.dataset.role = "buffer";
    byId("flow").prepend(node);
  }
  say(buffer.queued, `${whole(admission.queued)} waiting`);
  say(buffer.tokens, plural(admission.queued_tokens, "token"));
  say(buffer.window, admission.window_ms ? `leaves every ${millis(admission.window_ms)}` : admission.name);
  const notes = [
    ...(admission.parked ? [`${whole(admission.parked)} wait for decode`] : []),
    ...(admission.falling_back ? ["dispatching on arrival"] : []),
  ];
  say(buffer.note, notes.join(", "));
}

// ---- a worker

function newWorker(list) {
  const parts = {
    name: make("span", "name"),
    tag: make("span", "dim"),
    meter: meter(),
    kv: make("p"),
    batch: make("p"),
    pace: make("p"),
    note: make("p", "note warn"),
  };
  const head = make("p", "head", parts.name, parts.tag);
  parts.node = make("li", "worker", head, parts.kv, parts.meter, parts.batch, parts.pace, parts.note);
  list.append(parts.node);
  return parts;
}

function showWorker(list, worker, members) {
  if (!shown.has(worker.index)) shown.set(worker.index, newWorker(list));
  const parts = shown.get(worker.index);
  if (parts.node.parentNode !== list) list.append(parts.node); // its role was changed
  const isUp = worker.state === "ready";
  parts.node.dataset.up = isUp ? "yes" : "no";
  parts.node.dataset.role = worker.acting;
  say(parts.name, `w${worker.index}`);
  say(parts.tag, isUp ? tagOf(worker, members) : worker.state);
  showShare(parts.meter, worker.kv_use, worker.kv_use >= FULL);
  say(parts.kv, `KV ${percent(worker.kv_use)}${worker.kv_use >= FULL ? ", full" : ""}`);
  say(parts.batch, `${whole(worker.running)} running · ${whole(worker.waiting)} waiting`);
  say(parts.pace, paceWords(worker));
  const note = noteOf(worker, isUp);
  say(parts.note, note);
  parts.note.title = note;
}

/** How busy it is, and of which group where workers compute together. */
function tagOf(worker, members) {
  const together = members.filter((other) => other.instance === worker.instance).length > 1;
  const group = together ? `group ${worker.instance}` : "";
  const busy = known(worker.busy) ? `${percent(worker.busy)} busy` : "";
  return group || busy;
}

function paceWords(worker) {
  const tokens = worker.acting === "prefill" ? worker.prompt_tokens_per_s : worker.tokens_per_s;
  return `${millis(worker.step_ms)} · ${rate(tokens)} tok/s`;
}

function noteOf(worker, isUp) {
  const notes = [
    ...(worker.acting !== worker.role ? [`stands in for ${worker.acting}`] : []),
    ...(worker.restarts ? [plural(worker.restarts, "restart")] : []),
    ...(!isUp && worker.reason ? [worker.reason] : []),
  ];
  return notes.join(" · ");
}
