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
    const later = POOLS.slice(POOLS.findIndex(([one]) => one === role)).map(([one]) => pools.get(one)?.node);
    byId("flow").insertBefore(parts.node, later.find(known) ?? null);
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

/** What is told of a pool beside its name. */
function poolWords(role, members, { admission, handoff }) {
  if (role === "decode" && known(handoff.gb_per_s)) return `handoff ${rate(handoff.gb_per_s)} GB/s`;
  if (role === "prefill" && known(admission.fill)) return `passes ${percent(admission.fill)} full`;
  return plural(members.length, "worker");
}

// ---- the buffer

let buffer = null;

function showBuffer({ admission }) {
  if (!buffer) {
    const list = make("dl", "rows");
    buffer = { ...rows(list, ["waiting", "tokens", "parked", "every"]), note: make("p", "note") };
    const box = make("div", "buffer", list, buffer.note);
    const node = make("div", "pool", make("h3", "", make("span", "", "Buffer")), box);
    node.dataset.role = "buffer";
    byId("flow").prepend(node);
  }
  say(buffer.waiting, whole(admission.queued));
  say(buffer.tokens, short(admission.queued_tokens));
  say(buffer.parked, whole(admission.parked));
  say(buffer.every, admission.window_ms ? millis(admission.window_ms) : NOTHING);
  say(buffer.note, admission.falling_back ? "dispatches on arrival" : "");
}

// ---- a worker

function newWorker(list) {
  const numbers = make("dl", "rows");
  const parts = {
    ...rows(numbers, ["KV", "running", "waiting", "step", "tok/s"]),
    name: make("span", "name"),
    tag: make("span", "dim"),
    meter: meter(),
    note: make("p", "note"),
  };
  parts.node = make("li", "worker", make("p", "head", parts.name, parts.tag), parts.meter, numbers, parts.note);
  list.append(parts.node);
  return parts;
}

function showWorker(list, worker, members) {
  if (!shown.has(worker.index)) shown.set(worker.index, newWorker(list));
  const parts = shown.get(worker.index);
  if (parts.node.parentNode !== list) list.append(parts.node); // its role was changed
  const isUp = worker.state === "ready";
  const isFull = worker.kv_use >= FULL;
  const tokens = worker.acting === "prefill" ? worker.prompt_tokens_per_s : worker.tokens_per_s;
  parts.node.dataset.up = isUp ? "yes" : "no";
  parts.node.dataset.role = worker.acting;
  say(parts.name, `w${worker.index}`);
  say(parts.tag, isUp ? tagOf(worker, members) : worker.state);
  showShare(parts.meter, worker.kv_use, isFull);
  const told = (words) => (leads(worker) ? words : NOTHING);
  say(parts.KV, told(isFull ? `full, ${percent(worker.kv_use)}` : percent(worker.kv_use)));
  say(parts.running, told(whole(worker.running)));
  say(parts.waiting, told(whole(worker.waiting)));
  say(parts.step, told(millis(worker.step_ms)));
  say(parts["tok/s"], told(whole(tokens)));
  say(parts.note, noteOf(worker, isUp));
}

/** Whether the numbers of its team are told of it; they are 0 of one that follows. */
function leads(worker) {
  return worker.leader === worker.index;
}

/** How busy it is, and of which group where workers compute together. */
function tagOf(worker, members) {
  const together = members.filter((other) => other.instance === worker.instance).length > 1;
  const busy = known(worker.busy) && leads(worker) ? [`${percent(worker.busy)} busy`] : [];
  return [...(together ? [`#${worker.instance}`] : []), ...busy].join(" · ");
}

function noteOf(worker, isUp) {
  const notes = [
    ...(leads(worker) ? [] : [`computes with w${worker.leader}`]),
    ...(worker.acting !== worker.role ? [`stands in for ${worker.acting}`] : []),
    ...(worker.restarts ? [plural(worker.restarts, "restart")] : []),
    ...(!isUp && worker.reason ? [worker.reason] : []),
  ];
  return notes.join(" · ");
}
