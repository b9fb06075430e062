// A preference study in one page: two videos, some questions, answers kept in this browser and saved as a file.
// Asks nobody for anything. Words of others become text nodes, never markup.
"use strict";
(() => {
  const study = JSON.parse(document.getElementById("study").textContent);
  const app = document.getElementById("app"), live = document.getElementById("say");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const ANSWERS = ["left", "right", "comparable"], WORDS = ["Video 1", "Video 2", "Comparable"];
  const KIND = "vc2 study answers", RATER = /^[a-z0-9][a-z0-9_-]{0,31}$/;
  const PREFIX = `vc2-study/${study.study}/`;

  // ---- order: the same draws as vc2/eval/study/order.py ----

  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every(p => n % p)) primes.push(n);
  const bits = x => (x - Math.floor(x)) * 2 ** 32 | 0;
  const START = primes.slice(0, 8).map(p => bits(Math.sqrt(p))), ROUND = primes.map(p => bits(Math.cbrt(p)));
  const turn = (x, n) => x >>> n | x << 32 - n;

  function sha256(text) {
    const data = new TextEncoder().encode(text), blocks = data.length + 72 >> 6;
    const bytes = new Uint8Array(blocks * 64), view = new DataView(bytes.buffer), state = START.slice(), w = new Int32Array(64);
    bytes.set(data);
    bytes[data.length] = 128;
    view.setUint32(bytes.length - 4, data.length * 8);
    for (let block = 0; block < blocks; block++) {
      for (let i = 0; i < 64; i++) {
        if (i < 16) { w[i] = view.getInt32(block * 64 + i * 4); continue; }
        const x = w[i - 15], y = w[i - 2];
        w[i] = w[i - 16] + (turn(x, 7) ^ turn(x, 18) ^ x >>> 3) + w[i - 7] + (turn(y, 17) ^ turn(y, 19) ^ y >>> 10);
      }
      let [a, b, c, d, e, f, g, h] = state;
      for (let i = 0; i < 64; i++) {
        const one = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + (e & f ^ ~e & g) + ROUND[i] + w[i] | 0;
        const two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + (a & b ^ a & c ^ b & c) | 0;
        [a, b, c, d, e, f, g, h] = [one + two | 0, a, b, c, d + one | 0, e, f, g];
      }
      [a, b, c, d, e, f, g, h].forEach((x, i) => { state[i] = state[i] + x | 0; });
    }
    return state.map(x => (x >>> 0).toString(16).padStart(8, "0")).join("");
  }

  function trialsOf(rater) {
    const { matchups, most, repeats } = study;
    const draw = (purpose, name) => sha256(`${study.order_seed}/${rater}/${purpose}/${name}`);
    const byKey = pairs => pairs.sort((a, b) => a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : a[2] - b[2]);
    const drawn = (purpose, names) => byKey(names.map(name => [draw(purpose, name), name])).map(pair => pair[1]);
    const byId = new Map(matchups.map(matchup => [matchup.id, matchup]));
    const chosen = [], members = new Map();
    for (const m of matchups) if (!m.attention) members.set(m.twos, [...(members.get(m.twos) || []), m.id]);
    for (const twos of drawn("choice", [...members.keys()]))
      if (most === null || chosen.length < most) chosen.push(...members.get(twos));
    const order = drawn("order", [...chosen, ...matchups.filter(m => m.attention).map(m => m.id)]);
    const third = Math.floor(order.length / 3), rest = order.length - third;
    const wanted = Math.min(third, Math.floor(repeats * chosen.length + 0.5));
    const again = drawn("repeat", order.slice(0, third).filter(name => !byId.get(name).attention)).slice(0, wanted);
    const late = byKey([
      ...order.slice(rest).map(name => [draw("late", name), name, false]),
      ...again.map(name => [draw("again", name), name, true]),
    ]);
    return [...order.slice(0, rest).map(name => ["", name, false]), ...late].map(([, name, isRepeat]) => {
      const matchup = byId.get(name);
      const changed = parseInt(draw("sides", matchup.twos)[0], 16) % 2 === 1;
      const [left, right] = changed !== isRepeat ? [...matchup.videos].reverse() : matchup.videos;
      return { matchup: name, caption: matchup.caption, left, right, repeat: isRepeat };
    });
  }

  // ---- what is known of a rater, and where it is kept ----

  let state = null, trials = [], said = new Map(), saved = true; // said: the answers, by trial and question

  const storage = (() => {
    try {
      localStorage.setItem("vc2-study-probe", "1");
      localStorage.removeItem("vc2-study-probe");
      return localStorage;
    } catch { return null; }
  })();
  let keeps = storage !== null;

  const blank = rater => ({ kind: KIND, version: study.version, study: study.study, rater, started: now(), saved: "", answers: [], looked: {}, plays: {} });
  const now = () => new Date().toISOString();

  // A state from storage or a file of ours, with whatever is not as the page writes it left out; null: none at all.
  function adopt(data) {
    if (typeof data !== "object" || data === null || data.kind !== KIND || data.study !== study.study) return null;
    if (data.version !== study.version || typeof data.rater !== "string" || !RATER.test(data.rater) || !Array.isArray(data.answers)) return null;
    const own = blank(data.rater), list = trialsOf(data.rater), seen = new Set();
    if (typeof data.started === "string" && data.started.length < 40) own.started = data.started;
    for (const a of data.answers) {
      const trial = a && Number.isInteger(a.trial) ? list[a.trial] : null;
      if (!trial || trial.matchup !== a.matchup || trial.left !== a.left || trial.right !== a.right || trial.repeat !== a.repeat) continue;
      if (!study.questions.some(q => q.id === a.question) || ![...ANSWERS, "broken"].includes(a.answer)) continue;
      if (!(a.seconds >= 0 && a.seconds < 1e6 && Number.isInteger(a.plays) && a.plays >= 0) || typeof a.at !== "string") continue;
      const place = `${a.trial}/${a.question}`;
      if (seen.has(place)) continue;
      seen.add(place);
      const { trial: number, matchup, left, right, repeat, question, answer, seconds, plays, at } = a;
      own.answers.push({ trial: number, matchup, left, right, repeat, question, answer, seconds, plays, at });
      own.looked[number] = Math.max(own.looked[number] || 0, seconds);
      own.plays[number] = Math.max(own.plays[number] || 0, plays);
    }
    return own;
  }

  function load(rater) {
    try { return adopt(JSON.parse(storage.getItem(PREFIX + rater))); } catch { return null; }
  }

  function keep() {
    state.answers = [...said.values()];
    if (!keeps) return;
    try { storage.setItem(PREFIX + state.rater, JSON.stringify(state)); } catch { keeps = false; banner(); }
  }

  function known() {
    const found = [];
    try {
      for (let i = 0; storage && i < storage.length; i++) {
        const name = storage.key(i);
        if (name.startsWith(PREFIX)) found.push(load(name.slice(PREFIX.length)));
      }
    } catch { /* a browser that forgets */ }
    return found.filter(Boolean).sort((a, b) => a.rater < b.rater ? -1 : 1);
  }

  const answerOf = (number, question) => said.get(`${number}/${question}`);
  const isBroken = number => study.questions.some(q => answerOf(number, q.id)?.answer === "broken");
  const forget = number => study.questions.forEach(q => said.delete(`${number}/${q.id}`));
  const isDone = number => study.questions.every(q => answerOf(number, q.id));
  const firstOpen = () => trials.findIndex((_, number) => !isDone(number));
  const countDone = () => trials.filter((_, number) => isDone(number)).length;

  function record(number, question, answer) {
    const { matchup, left, right, repeat } = trials[number];
    const seconds = Math.round((state.looked[number] || 0) * 10) / 10, plays = state.plays[number] || 0;
    said.set(`${number}/${question}`, { trial: number, matchup, left, right, repeat, question, answer, seconds, plays, at: now() });
    saved = false;
    keep();
  }

  function exported() {
    const { kind, version, rater, started } = state;
    const order = new Map(study.questions.map((q, i) => [q.id, i]));
    const answers = [...said.values()].sort((a, b) => a.trial - b.trial || order.get(a.question) - order.get(b.question));
    return JSON.stringify({ kind, version, study: study.study, rater, started, saved: now(), trials: trials.length, answers }, null, 1) + "\n";
  }

  function download() {
    const url = URL.createObjectURL(new Blob([exported()], { type: "application/json" }));
    const link = el("a", { href: url, download: `answers-${study.study.slice(0, 8)}-${state.rater}.json` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    saved = true;
    say("Answers saved as a file.");
  }

  // ---- elements ----

  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }
  const key = name => el("kbd", { "aria-hidden": "true" }, name);
  const button = (words, act, attributes = {}, ...more) => el("button", { type: "button", onclick: act, ...attributes }, words, ...more);
  const say = words => { live.textContent = ""; setTimeout(() => { live.textContent = words; }, 30); };

  function show(...parts) {
    app.replaceChildren(...parts);
    banner();
    scrollTo(0, 0);
  }

  function banner() {
    document.querySelector(".banner")?.remove();
    if (!keeps) app.prepend(el("p", { class: "banner", role: "alert" }, "This browser keeps nothing: save your answers as a file before you close or reload the page."));
  }

  const minutes = count => {
    const each = Math.max(study.min_seconds, study.seconds * Math.max(1, study.min_plays)) + 3 * study.questions.length;
    return Math.max(1, Math.round(count * each / 60));
  };
  const many = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

  // ---- start ----

  function randomName() {
    const bytes = crypto.getRandomValues(new Uint8Array(5));
    return "r" + [...bytes].map(b => b.toString(16).padStart(2, "0")).join("").slice(0, 7);
  }

  function start() {
    leave();
    state = null;
    const count = trialsOf("example").length, others = known();
    const name = el("input", { id: "rater", value: randomName(), autocomplete: "off", autocapitalize: "none", spellcheck: "false", maxlength: 32, "aria-describedby": "rater-hint rater-trouble" });
    const trouble = el("p", { id: "rater-trouble", class: "trouble", role: "alert" });
    const begin = event => {
      event.preventDefault();
      const rater = name.value.trim().toLowerCase();
      if (!RATER.test(rater)) {
        trouble.textContent = "Up to 32 letters, digits, - or _, please; a letter or digit first.";
        name.focus();
        return;
      }
      enter(load(rater) || blank(rater));
    };
    const file = el("input", { type: "file", id: "import", accept: ".json,application/json", class: "unseen", tabindex: -1, "aria-label": "File of answers" });
    const wrong = el("p", { class: "trouble", role: "alert" });
    file.addEventListener("change", async () => {
      let found = null;
      try { found = adopt(JSON.parse(await file.files[0].text())); } catch { /* told below */ }
      file.value = "";
      if (!found) { wrong.textContent = "This file holds no answers to this study."; return; }
      const here = load(found.rater);
      enter(here && here.answers.length > found.answers.length ? here : found);
    });
    const resume = others.map(other => {
      const list = trialsOf(other.rater), each = new Map();
      other.answers.forEach(a => each.set(a.trial, (each.get(a.trial) || 0) + 1));
      const done = list.filter((_, n) => each.get(n) === study.questions.length).length;
      return el("li", {}, button("Continue as ", () => enter(other), { class: "main" }, el("b", {}, other.rater)), el("span", { class: "muted" }, `${done} of ${list.length} answered`));
    });
    const asked = study.questions.map(q => el("li", {}, el("b", {}, q.title), q.hint ? el("span", {}, " ", q.hint) : ""));
    show(el("main", { class: "start" },
      el("h1", {}, study.title),
      el("p", { class: "lead" }, `You will see ${many(count, "pair")} of short videos${study.captions ? ", each made from the text above it" : ""}, and say which of the two you prefer. It takes about ${many(minutes(count), "minute")}; you can stop at any time and go on later. Nothing is sent anywhere: at the end you save your answers as a file, and hand it to whoever asked you.`),
      others.length ? el("section", { class: "card" }, el("h2", {}, "Go on"), el("ul", { class: "resume" }, ...resume)) : "",
      el("form", { class: "card", onsubmit: begin },
        el("h2", {}, others.length ? "Start as somebody else" : "Start"),
        el("label", { for: "rater" }, "Your name or number in this study"),
        el("div", { class: "row" }, name, el("button", { class: others.length ? "" : "main" }, "Start")),
        el("p", { id: "rater-hint", class: "muted small" }, "It stands in the file you save. Keep the random one to stay unnamed."),
        trouble),
      el("section", { class: "card" },
        el("h2", {}, study.questions.length === 1 ? "The question" : "The questions"),
        el("ul", { class: "asked" }, ...asked),
        el("p", {}, "Trust your eyes, and take the whole video into account. If you see no difference that matters, answer ", el("b", {}, "Comparable"), study.repeats ? ". Some pairs come twice." : ".")),
      el("section", { class: "card at-keyboards" }, el("h2", {}, "Keys"), keyList()),
      el("section", { class: "card quiet" },
        el("h2", {}, "Answers from another computer"),
        el("p", {}, "Saved answers before? Go on with that file here."),
        button("Open a file of answers", () => file.click()), file, wrong)));
    if (others.length) app.querySelector(".resume button").focus();
  }

  function keyList() {
    const rows = [
      [["1"], "Video 1 is better"], [["2"], "Video 2 is better"], [["3"], "comparable"], [["Enter"], "on to the next pair"],
      [["B"], "back to the pair before"], [["Space"], "pause or play"], [["R"], "both from the start"], [["0"], "a video does not play"],
    ];
    return el("dl", { class: "keys" }, ...rows.map(([names, words]) => el("div", {}, el("dt", {}, ...names.map(n => el("kbd", {}, n))), el("dd", {}, words))));
  }

  function enter(own) {
    state = own;
    trials = trialsOf(state.rater);
    said = new Map(state.answers.map(a => [`${a.trial}/${a.question}`, a]));
    keep();
    const open = firstOpen();
    open < 0 ? end() : visit(open);
  }

  // ---- two videos that play together ----

  class Players {
    constructor(trial) {
      this.videos = [trial.left, trial.right].map(name => el("video", { src: `videos/${name}`, preload: "auto", muted: true, playsinline: true, disablepictureinpicture: true, disableremoteplayback: true, tabindex: -1 }));
      this.videos.forEach(video => { video.muted = true; });
      this.isWanted = false; // by the rater; whether they run also depends on the page being seen
      this.failed = this.videos.map(() => false);
      this.onplay = this.onfail = this.onstate = () => {};
      this.videos.forEach((video, place) => {
        video.addEventListener("error", () => { this.failed[place] = true; this.onfail(place); });
        video.addEventListener("ended", () => this.ended());
        for (const name of ["canplay", "seeked"]) video.addEventListener(name, () => this.run());
      });
    }
    // A video at its end has no frame to come: to the standard it is less than ready, though nothing is missing.
    get isReady() { return this.videos.every(v => v.ended || v.readyState >= 3); }
    get isBroken() { return this.failed.some(Boolean); }
    get isHeld() { return !this.isWanted || document.hidden || this.isBroken; }
    get isRunning() { return !this.isHeld && this.isReady; }
    pause() { this.videos.forEach(v => v.pause()); }
    // Both start when both can; the shorter waits for the longer.
    run() {
      if (this.isHeld) return this.pause();
      if (this.videos.every(v => v.ended)) this.rewind();
      if (this.videos.some(v => v.seeking)) return; // "seeked" comes; to pause and play again would part them
      if (!this.isReady) return this.pause(); // "canplay" comes
      this.videos.filter(v => !v.ended && v.paused).forEach(v => v.play().catch(error => {
        if (error.name === "NotAllowedError") { this.isWanted = false; this.onstate(); }
      }));
    }
    rewind() { this.videos.forEach(v => { v.currentTime = 0; }); }
    want(isWanted) { this.isWanted = isWanted; this.run(); this.onstate(); }
    restart() { this.stay(); this.pause(); this.rewind(); this.want(true); }
    stay() { clearTimeout(this.again); this.again = 0; } // what was to begin again does not
    ended() {
      if (!this.videos.every(v => v.ended) || this.again) return;
      this.onplay();
      this.again = setTimeout(() => { this.again = 0; if (!still.matches) this.run(); else this.want(false); }, 500);
    }
    // Decoders drift when a machine is busy: the one ahead is set back to the other.
    align() {
      const [a, b] = this.videos;
      if (!this.isRunning || a.ended || b.ended || a.seeking || b.seeking) return;
      const lead = a.currentTime - b.currentTime;
      if (Math.abs(lead) > 0.12) (lead > 0 ? a : b).currentTime = Math.min(a.currentTime, b.currentTime);
    }
    drop() { this.stay(); this.isWanted = false; this.videos.forEach(v => { v.pause(); v.removeAttribute("src"); v.load(); }); this.onfail = this.onplay = this.onstate = () => {}; }
  }

  // ---- a trial ----

  let current = null, ahead = null, clock = 0;

  function leave() {
    clearInterval(clock);
    current?.players.drop();
    current = null;
  }

  function visit(number) {
    leave();
    const trial = trials[number];
    const players = ahead?.trial === trial ? ahead.players : new Players(trial);
    if (ahead && ahead.trial !== trial) ahead.players.drop();
    ahead = null;
    current = { number, trial, players, question: 0, isOpen: false };
    draw();
    players.onstate = updatePlay;
    players.onfail = place => fail(place);
    players.onplay = () => { state.plays[number] = (state.plays[number] || 0) + 1; keep(); unlock(); fetchNext(); };
    players.failed.forEach((failed, place) => failed && fail(place));
    const open = study.questions.findIndex(q => !answerOf(number, q.id));
    choose(open < 0 ? study.questions.length - 1 : open);
    refresh();
    players.want(!still.matches);
    let before = performance.now();
    clock = setInterval(() => {
      const time = performance.now(), passed = Math.min(0.5, (time - before) / 1000);
      before = time;
      if (document.hidden || !players.isReady) return;
      if (players.isRunning) state.looked[number] = (state.looked[number] || 0) + passed;
      players.align();
      unlock();
    }, 100);
    app.querySelector("h1").focus({ preventScroll: true });
    say(`Pair ${number + 1} of ${trials.length}.`);
  }

  function fetchNext() {
    const next = current.number + 1;
    if (!ahead && next < trials.length) ahead = { trial: trials[next], players: new Players(trials[next]) };
  }

  function draw() {
    const { number, trial, players } = current, done = countDone(), total = trials.length;
    const bar = el("div", { class: "bar", role: "progressbar", "aria-label": "Pairs answered", "aria-valuemin": 0, "aria-valuemax": total, "aria-valuenow": done }, el("i"));
    bar.firstChild.style.width = `${100 * done / total}%`;
    const figures = players.videos.map((video, place) => {
      video.setAttribute("aria-label", `Video ${place + 1}`);
      return el("figure", {}, el("div", { class: "frame" }, video, el("p", { class: "absent", hidden: true }, "This video does not play.")), el("figcaption", {}, el("b", {}, `${place + 1}`), ` Video ${place + 1}`));
    });
    const questions = study.questions.map((question, place) => {
      const options = ANSWERS.map((answer, which) => {
        const input = el("input", { type: "radio", name: question.id, value: answer, onchange: () => answered(place, answer) });
        return el("label", { class: "option" }, input, el("span", {}, WORDS[which]), key(`${which + 1}`));
      });
      return el("fieldset", { class: "question card", onfocusin: () => choose(place), onpointerdown: () => choose(place), disabled: true },
        el("legend", {}, el("span", {}, question.title)),
        question.hint ? el("p", { class: "hint" }, question.hint) : "",
        el("div", { class: "options" }, ...options));
    });
    const steps = el("div", { class: "steps", role: "group", "aria-label": "Questions" }, ...study.questions.map((question, place) =>
      button(`${place + 1}`, () => choose(place), { "aria-label": `Question ${place + 1}: ${question.title}` })));
    show(
      el("header", {}, el("div", {},
        el("span", { class: "count" }, "Pair ", el("b", {}, `${number + 1}`), ` of ${total}`), bar,
        button("Save answers", download, { class: "save", title: "save what you have answered so far as a file" }),
        button("Leave", start, { title: keeps ? "your answers stay in this browser" : "save your answers first" }))),
      el("main", { class: "trial" },
        el("h1", { class: study.captions ? "caption" : "caption plain", tabindex: -1 }, study.captions ? trial.caption : "Look at both videos"),
        el("div", { class: "pair" }, ...figures),
        el("div", { class: "tools" },
          button("Pause", toggle, { class: "play" }), button("From the start", again, { class: "again" }, key("R")),
          el("p", { class: "wait" }, el("span", { class: "ring", "aria-hidden": "true" }), el("span", { class: "words" }))),
        el("div", { class: "panel" },
          study.questions.length > 1 ? steps : "",
          el("div", { class: "questions" }, ...questions),
          el("nav", { "aria-label": "Pairs" },
            button("Back", back, { class: "back", disabled: number === 0 }, key("B")),
            button("A video does not play", toggleBroken, { class: "broken", "aria-pressed": "false" }, key("0")),
            button(number + 1 === total ? "Finish" : "Next pair", next, { class: "next" }, key("Enter"))))));
    app.querySelector(".questions").style.setProperty("--count", Math.min(3, study.questions.length));
    updatePlay();
  }

  function fail(place) {
    const figure = app.querySelectorAll("figure")[place];
    figure.querySelector(".absent").hidden = false;
    figure.querySelector("video").hidden = true;
    app.querySelector(".broken").classList.add("asked");
    say(`Video ${place + 1} does not play. Press 0 to say so and go on.`);
    unlock();
  }

  function updatePlay() {
    const play = app.querySelector("button.play");
    if (play) play.replaceChildren(current.players.isWanted ? "Pause" : "Play", key("Space"));
  }

  // Answers are taken once both videos were seen.
  function unlock() {
    const { number, players } = current;
    const plays = state.plays[number] || 0, looked = state.looked[number] || 0;
    const isOpen = !players.isBroken && (isDone(number) || (plays >= study.min_plays && looked >= study.min_seconds));
    const wait = app.querySelector(".wait");
    const [a, b] = players.videos, longest = Math.max(a.duration || 0, b.duration || 0);
    const share = study.min_plays ? Math.min(1, (plays + (longest ? Math.max(a.currentTime, b.currentTime) / longest : 0)) / study.min_plays) : 1;
    const part = Math.min(plays >= study.min_plays ? 1 : share, study.min_seconds ? looked / study.min_seconds : 1);
    wait.querySelector(".ring").style.setProperty("--part", isOpen ? 1 : Math.min(1, part));
    wait.classList.toggle("done", isOpen);
    wait.querySelector(".words").textContent = players.isBroken ? "Say that it does not play, and go on." : isOpen ? "You can answer." :
      !players.isReady ? "Loading." : players.isWanted ? `Look at both to the end${study.min_plays > 1 ? `, ${study.min_plays} times` : ""}.` : "Press Play to see both.";
    if (isOpen === current.isOpen) return;
    current.isOpen = isOpen;
    app.querySelectorAll("fieldset").forEach(set => { set.disabled = !isOpen; });
    if (isOpen) say("You can answer now.");
  }

  function choose(place) {
    current.question = place;
    app.querySelectorAll(".question").forEach((set, at) => set.classList.toggle("current", at === place));
    app.querySelectorAll(".steps button").forEach((step, at) => at === place ? step.setAttribute("aria-current", "step") : step.removeAttribute("aria-current"));
  }

  function refresh() {
    const { number } = current, broken = isBroken(number);
    study.questions.forEach((question, place) => {
      const answer = answerOf(number, question.id)?.answer, set = app.querySelectorAll(".question")[place];
      set.querySelectorAll("input").forEach(input => { input.checked = input.value === answer; });
      set.classList.toggle("answered", Boolean(answer));
      app.querySelectorAll(".steps button")[place]?.classList.toggle("answered", Boolean(answer));
    });
    app.querySelector(".broken").setAttribute("aria-pressed", broken);
    app.querySelector(".next").classList.toggle("main", isDone(number));
    const done = countDone(), bar = app.querySelector(".bar");
    bar.setAttribute("aria-valuenow", done);
    bar.firstChild.style.width = `${100 * done / trials.length}%`;
    unlock();
  }

  function answered(place, answer) {
    const { number } = current;
    if (!current.isOpen) return say("Look at both videos to the end first.");
    if (isBroken(number)) forget(number);
    record(number, study.questions[place].id, answer);
    const open = study.questions.findIndex(q => !answerOf(number, q.id));
    refresh();
    if (open >= 0) choose(open);
    const words = WORDS[ANSWERS.indexOf(answer)];
    say(open >= 0 ? `${words}. ${study.questions[open].title}` : `${words}. All answered; Enter goes on.`);
  }

  function toggleBroken() {
    const { number } = current;
    if (isBroken(number)) {
      forget(number);
      keep();
    } else study.questions.forEach(question => record(number, question.id, "broken"));
    refresh();
    say(isBroken(number) ? "Noted: a video does not play. Enter goes on." : "Taken back.");
  }

  const again = () => current.players.isBroken ? visit(current.number) : current.players.restart();
  const toggle = () => current.players.want(!current.players.isWanted);
  const back = () => { if (current.number > 0) visit(current.number - 1); };

  function next() {
    const open = study.questions.findIndex(q => !answerOf(current.number, q.id));
    if (open >= 0) {
      choose(open);
      if (!current.isOpen) say("Look at both videos to the end first.");
      else {
        app.querySelectorAll(".question")[open].querySelector("input").focus();
        say(`Not answered yet: ${study.questions[open].title}`);
      }
      return;
    }
    if (current.number + 1 < trials.length) visit(current.number + 1);
    else if (firstOpen() >= 0) visit(firstOpen());
    else end();
  }

  // ---- end ----

  function end() {
    leave();
    const text = el("textarea", { readonly: true, rows: 6, "aria-label": "Answers as text", onfocus: event => event.target.select() });
    text.value = exported();
    const broken = trials.filter((_, number) => isBroken(number)).length;
    show(el("main", { class: "start end" },
      el("h1", { tabindex: -1 }, "Thank you, that was all."),
      el("p", { class: "lead" }, `${many(trials.length, "pair")} answered as `, el("b", {}, state.rater), broken ? `; in ${broken} of them a video did not play` : "", ". One thing is left: save the answers as a file and hand it to whoever asked you."),
      el("div", { class: "row" }, button("Save answers", download, { class: "main save" }), button("Look at them again", () => visit(0)), button("To the start", start)),
      el("details", {}, el("summary", {}, "No file appears? Copy the answers as text"), text)));
    app.querySelector("h1").focus();
    say("All pairs are answered. Save your answers as a file.");
  }

  // ---- keys, and leaving ----

  addEventListener("keydown", event => {
    if (!current || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const tag = event.target.tagName, isRadio = tag === "INPUT" && event.target.type === "radio";
    if ((tag === "INPUT" && !isRadio) || tag === "TEXTAREA" || tag === "SELECT") return;
    const onButton = tag === "BUTTON" || tag === "A" || tag === "SUMMARY";
    const act = {
      1: () => answered(current.question, "left"), 2: () => answered(current.question, "right"), 3: () => answered(current.question, "comparable"),
      0: toggleBroken, b: back, r: again,
      " ": onButton || isRadio ? null : toggle, Enter: onButton ? null : next,
    }[event.key.toLowerCase() === "enter" ? "Enter" : event.key.toLowerCase()];
    if (!act || (event.repeat && event.key !== " ")) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("visibilitychange", () => current?.players.run());
  addEventListener("beforeunload", event => { if (state && !saved && !keeps) event.preventDefault(); });
  addEventListener("storage", event => {
    if (state && event.key === PREFIX + state.rater) say("This study is open in another tab, too: use one of them.");
  });

  document.documentElement.style.setProperty("--aspect", study.aspect);
  window.vc2Study = { trialsOf, sha256 };
  start();
})();
