"use strict";
// The prompt box: one question to the gateway's own chat route, streamed, with its own stopwatch.

let asking = null; // an AbortController while an answer runs

/** The events of a server-sent stream, up to its [DONE]; an error if it breaks off before. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off: the connection is gone");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

class Stopwatch {
  constructor() {
    this.began = performance.now();
    this.first = null;
    this.last = null;
    this.tokens = 0;
    this.show();
  }

  count(tokens) {
    if (tokens <= this.tokens) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.firstTokens ??= tokens;
    this.tokens = tokens;
    this.show();
  }

  /** Of the tokens after the first event, over the time that they took. */
  get rate() {
    const took = (this.last - this.first) / 1000;
    return took > 0 ? (this.tokens - this.firstTokens) / took : null;
  }

  show() {
    say(byId("ask-ttft"), this.first === null ? NOTHING : millis(this.first - this.began));
    say(byId("ask-tokens"), this.tokens ? whole(this.tokens) : NOTHING);
    say(byId("ask-rate"), rate(this.rate));
  }
}

function chatRequest(prompt) {
  const body = {
    messages: [{ role: "user", content: prompt }],
    max_completion_tokens: byId("max-tokens").valueAsNumber,
    stream: true,
    stream_options: { continuous_usage_stats: true },
  };
  const headers = { "content-type": "application/json", ...keyHeader() };
  return { method: "POST", headers, body: JSON.stringify(body) };
}

/** Sends the prompt and writes down what comes; returns why the answer ended. */
async function stream(prompt, signal) {
  const watch = new Stopwatch();
  const response = await fetch("v1/chat/completions", { ...chatRequest(prompt), signal });
  if (!response.ok) throw await problemOf(response);
  const text = byId("answer").appendChild(document.createTextNode(""));
  let reason = "";
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (choice?.delta?.content) write(text, choice.delta.content);
    reason = choice?.finish_reason ?? reason;
    watch.count(event.usage?.completion_tokens ?? 0);
  }
  return reason;
}

/** The newest line stays in sight of a reader who is at the end. */
function write(text, words) {
  const box = byId("answer");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
  text.appendData(words);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

const ENDS = { length: "Ended at the most tokens that were asked for.", stop: "Done." };

async function ask(prompt) {
  asking = new AbortController();
  byId("answer").replaceChildren();
  const hadFocus = document.activeElement === byId("send");
  showAsking(true, "Answering …");
  if (hadFocus) byId("stop").focus();
  try {
    const reason = await stream(prompt, asking.signal);
    showAsking(false, ENDS[reason] ?? `Ended: ${reason}.`);
  } catch (error) {
    const words = error.name === "AbortError" ? "Stopped." : `No answer: ${error.message}`;
    showAsking(false, words, error.name !== "AbortError");
    if (error.status === 401) needKey(error.message);
  } finally {
    asking = null;
  }
}

function showAsking(isRunning, words, isBad = false) {
  const fromStop = document.activeElement === byId("stop");
  byId("send").disabled = isRunning;
  byId("stop").disabled = !isRunning;
  byId("ask-state").className = isBad ? "bad" : "";
  say(byId("ask-state"), words);
  if (!isRunning && fromStop) byId("send").focus();
}

const stop = () => asking?.abort();

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!asking) ask(byId("prompt").value);
});
byId("stop").addEventListener("click", stop);
byId("ask").addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
});
