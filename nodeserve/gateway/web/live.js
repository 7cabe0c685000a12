"use strict";
// Asks for the node's state once a second while the page is in sight, and says honestly how it stands.

const PERIOD_MS = 1000;
const PATIENCE_MS = 10000;
const KEY = "nodeserve-api-key";
let timer = null;
let seen = null; // when the node answered last, by performance.now()
let isPolling = false;

// ---- the key

function keyHeader() {
  const key = sessionStorage.getItem(KEY);
  if (!key) return {};
  const bytes = new TextEncoder().encode(key); // a header is bytes, and those of a key are UTF-8
  return { authorization: `Bearer ${String.fromCharCode(...bytes)}` };
}

function needKey(words) {
  clearTimeout(timer);
  const hadOne = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  byId("board").hidden = byId("ask").hidden = true;
  byId("key-panel").hidden = false;
  say(byId("key-words"), hadOne ? `That key does not count here: ${words}` : "This gateway answers only those who show a key.");
  showState("locked", "API key needed");
  byId("key").value = "";
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key-panel").hidden = true;
  byId("board").hidden = byId("ask").hidden = false;
  showState("loading", "Connecting");
  poll();
  byId("prompt").focus();
});

// ---- how it stands

function showState(state, words) {
  document.body.dataset.state = state;
  say(byId("state-text"), words);
}

/** An error response as an Error with its status. */
async function problemOf(response) {
  const body = await response.json().catch(() => null);
  const words = body?.error?.message ?? `the gateway answered ${response.status}`;
  return Object.assign(new Error(words), { status: response.status });
}

function showView(view) {
  seen = performance.now();
  document.body.dataset.seen = "yes";
  say(byId("verdict-title"), "What limits goodput now");
  const isWell = view.state === "ready";
  showState(isWell ? "live" : "degraded", isWell ? "Live" : capital(view.state));
  showPanels(view);
  showLayout(view);
}

function showDown(error) {
  if (error.status === 401) return needKey(error.message);
  const fromNode = known(error.status);
  showState("down", fromNode ? "Node down" : "Gateway away");
  const words = fromNode ? error.message : "the gateway does not answer; this page asks again every second";
  say(byId("verdict-title"), "Why nothing new is shown");
  say(byId("verdict-text"), capital(words));
  const reasons = byId("reasons");
  reasons.hidden = seen === null;
  if (seen !== null) say(reasons, `Below is what it said ${duration((performance.now() - seen) / 1000)} ago.`);
}

const capital = (words) => words.charAt(0).toUpperCase() + words.slice(1);

// ---- asking

async function fetchView() {
  const signal = AbortSignal.timeout(PATIENCE_MS);
  const response = await fetch("nodeserve/view", { headers: keyHeader(), cache: "no-store", signal });
  if (!response.ok) throw await problemOf(response);
  return response.json();
}

async function poll() {
  clearTimeout(timer);
  if (isPolling || document.hidden || document.body.dataset.state === "locked") return;
  isPolling = true;
  let view = null;
  try {
    view = await fetchView();
  } catch (error) {
    showDown(error);
  } finally {
    isPolling = false;
  }
  if (view) showView(view);
  if (document.body.dataset.state !== "locked") timer = setTimeout(poll, PERIOD_MS);
}

document.addEventListener("visibilitychange", poll); // nobody looks: nobody asks
poll();
