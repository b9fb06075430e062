// The report's movement: videos that belong together play together, the wall is filtered and sorted, losses are read
// off. Without it everything is there all the same: videos with their controls, scores as tables.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const AHEAD = "300px", PAGE = 48;
  let playing = !still, slow = false;

  // ---- videos ----
  const controls = document.querySelector(".controls");
  if (controls) together(controls);

  function together(controls) {
    // Clips that belong together start together, and wait for the longest before they start again. A video of a large
    // page is handed to the player when it comes near and taken back when it is far: players are few.
    const seen = new Set(), lazy = new Map();
    const groups = new Map();
    for (const root of all("[data-together]")) {
      const videos = all("video", root);
      if (videos.length) groups.set(root, { root, videos });
    }
    const run = video => { const promise = video.play(); if (promise) promise.catch(() => {}); };
    const restart = group => group.videos.forEach(video => { video.currentTime = 0; if (playing) run(video); });
    const apply = group => group.videos.forEach(video => {
      video.playbackRate = slow ? 0.5 : 1;
      if (playing && seen.has(group.root)) { if (!video.ended) run(video); } else video.pause();
    });
    for (const group of groups.values()) {
      for (const video of group.videos) {
        video.controls = false;
        if (video.preload === "none") {
          lazy.set(video, video.getAttribute("src"));
          video.removeAttribute("src");
        }
        if (group.videos.length === 1) continue;
        video.loop = false;
        video.addEventListener("ended", () => {
          if (playing && group.videos.every(v => v.ended || v.error)) {
            setTimeout(() => { if (playing && seen.has(group.root)) restart(group); }, 250);
          }
        });
      }
    }
    const hand = (group, near) => group.videos.forEach(video => {
      if (!lazy.has(video) || near === video.hasAttribute("src")) return;
      video.preload = near ? "auto" : "none";
      if (near) video.src = lazy.get(video); else { video.removeAttribute("src"); video.load(); }
    });
    const watcher = new IntersectionObserver(entries => {
      for (const entry of entries) {
        const group = groups.get(entry.target);
        if (entry.isIntersecting) { seen.add(group.root); hand(group, true); apply(group); if (playing) restart(group); }
        else { seen.delete(group.root); apply(group); hand(group, false); }
      }
    }, { rootMargin: AHEAD });
    groups.forEach(group => watcher.observe(group.root));

    const [play, back, forth, half, crisp] = all("button", controls);
    controls.hidden = groups.size === 0;
    const show = () => {
      play.textContent = playing ? "Pause" : "Play";
      half.setAttribute("aria-pressed", slow);
      crisp.setAttribute("aria-pressed", document.body.classList.contains("crisp"));
      groups.forEach(apply);
    };
    const visible = () => [...groups.values()].filter(group => seen.has(group.root));
    const toggle = () => {
      playing = !playing;
      show();
      if (playing) visible().filter(group => group.videos.every(v => v.ended)).forEach(restart);
    };
    const step = by => {
      playing = false;
      show();
      visible().forEach(group => group.videos.forEach(video => {
        const frame = 1 / (Number(video.dataset.fps) || 8), last = Math.max(0, Math.round((video.duration || 0) / frame) - 1);
        const shown = Math.min(last, Math.floor(video.currentTime / frame + 0.001));
        video.currentTime = (Math.min(last, Math.max(0, shown + by)) + 0.5) * frame;
      }));
    };
    play.onclick = toggle;
    back.onclick = () => step(-1);
    forth.onclick = () => step(1);
    half.onclick = () => { slow = !slow; show(); };
    crisp.onclick = () => { document.body.classList.toggle("crisp"); show(); };
    addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey || /^(input|textarea|select)$/i.test(event.target.tagName)) return;
      const act = { k: toggle, ",": () => step(-1), ".": () => step(1) }[event.key];
      if (act) act();
    });
    show();
  }

  // ---- the wall ----
  const form = document.querySelector("form.filters");
  if (form) arrange(form);

  function arrange(form) {
    const columns = JSON.parse(form.dataset.columns), reasons = JSON.parse(form.dataset.reasons);
    const stage = document.querySelector(".stage"), wall = document.querySelector(".wall.all");
    const more = document.querySelector(".more-videos"), [next, every] = all("button", more);
    const output = form.querySelector("output"), fields = form.elements;
    const tables = all(".scores-table");
    const cards = [...all(".shot", stage), ...all(".shot", wall)].map((card, place) => ({
      card, place,
      tags: card.dataset.tags ? card.dataset.tags.split(" ") : ["none"],
      classes: (card.dataset.classes || "").split(","),
      words: card.querySelector("h3").textContent.toLowerCase(),
      value: card.querySelector(".value"),
      rows: tables.map(table => table.querySelector("tbody").rows[place]),
      told: {},
    }));
    let limit = PAGE, order = cards.slice(1).map(entry => entry.place).join();

    // What one card says of a figure: its value, and why there is none or what is strange about it.
    const told = (entry, mode) => entry.told[mode] ||= (entry.card.getAttribute(`data-${mode}`) || "").split(",").map(text => {
      const [value, why] = text.split("!");
      return { value: value === "" ? null : Number(value), why: why ? reasons[why - 1] : "" };
    });
    const figure = (entry, mode, name) => {
      const place = columns[mode].findIndex(column => column[0] === name);
      return place < 0 ? { value: null, why: "" } : told(entry, mode)[place];
    };
    const words = (entry, mode, name) => {
      const [, label, unit, scale, digits] = columns[mode].find(column => column[0] === name);
      const { value, why } = figure(entry, mode, name);
      const number = value === null ? "" : `${(value * scale).toFixed(digits)} ${unit}`.trim();
      const said = number && why ? `${number} (${why})` : number || why || "does not apply";
      return mode === "judges" ? `${label} ${said}` : `${mode} ${said}`;
    };
    const has = (mode, name) => (columns[mode] || []).some(column => column[0] === name);
    const asked = () => {
      const [group, name] = fields.metric && fields.metric.value ? fields.metric.value.split(":") : ["", ""];
      let mode = group || (fields.mode ? fields.mode.value : "");
      if (name && !has(mode, name)) mode = Object.keys(columns).find(other => has(other, name));
      return { name, mode, up: fields.order ? fields.order.value === "up" : false };
    };

    const update = () => {
      const { name, mode, up } = asked();
      const wanted = fields.words.value.toLowerCase().split(/\s+/).filter(Boolean);
      const tags = all("[name=tag]:checked", form).map(box => box.value);
      const kind = fields.class ? fields.class.value : "";
      const fits = entry => wanted.every(word => entry.words.includes(word))
        && (!tags.length || tags.some(tag => entry.tags.includes(tag)))
        && (!kind || entry.classes.includes(kind));
      const shown = cards.filter(fits);
      if (name) {
        const key = entry => figure(entry, mode, name).value;
        const rank = entry => key(entry) !== null ? 0 : figure(entry, mode, name).why ? 1 : 2;
        shown.sort((a, b) => rank(a) - rank(b) || (up ? key(a) - key(b) : key(b) - key(a)) || a.place - b.place);
      }
      const isPlain = !name && shown.length === cards.length;
      const modes = Object.keys(columns).filter(other => other !== "judges" && has(other, name));
      for (const entry of cards.filter(entry => entry.value)) {
        entry.value.hidden = !name;
        entry.value.textContent = !name ? "" : mode === "judges" ? words(entry, mode, name)
          : `${name}: ${modes.map(other => words(entry, other, name)).join(" · ")}`;
      }
      place(shown, isPlain);
      const valued = name ? shown.filter(entry => figure(entry, mode, name).value !== null).length : 0;
      output.textContent = `${shown.length} of ${cards.length} videos` + (name ? `, ${valued} with a value` : "");
      tables.forEach((table, number) => lay(table, number, shown, name, mode, up));
    };

    // The first video is large as long as nothing is asked; then it is one of the others.
    const place = (shown, isPlain) => {
      const first = cards[0].card, ordered = isPlain ? shown.slice(1) : shown;
      first.classList.toggle("hero", isPlain);
      if (isPlain && first.parentNode !== stage) stage.append(first);
      const key = ordered.map(entry => entry.place).join();
      if (key !== order) { wall.append(...ordered.map(entry => entry.card)); order = key; }
      const open = new Set(ordered.slice(0, limit));
      for (const entry of cards) entry.card.hidden = !(open.has(entry) || (isPlain && entry.card === first));
      more.hidden = ordered.length <= limit;
      next.textContent = `Show ${Math.min(PAGE, ordered.length - limit)} more`;
      every.textContent = `Show all ${ordered.length}`;
    };

    const lay = (table, number, shown, name, mode, up) => {
      for (const head of all("th[data-metric]", table)) {
        const is = head.dataset.metric === name && head.dataset.mode === mode;
        if (is) head.setAttribute("aria-sort", up ? "ascending" : "descending"); else head.removeAttribute("aria-sort");
      }
      if (!table.open) { table.dirty = true; return; }
      table.dirty = false;
      const fits = new Set(shown);
      for (const entry of cards) entry.rows[number].hidden = !fits.has(entry);
      table.querySelector("tbody").append(...shown.map(entry => entry.rows[number]));
    };

    for (const table of tables) {
      table.addEventListener("toggle", () => { if (table.open && table.dirty) update(); });
      for (const head of all("th[data-metric]", table)) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = head.textContent;
        head.replaceChildren(button);
        button.onclick = () => {
          const { name, mode, up } = asked(), again = head.dataset.metric === name && head.dataset.mode === mode;
          fields.metric.value = `:${head.dataset.metric}`;
          fields.mode.value = head.dataset.mode;
          fields.order.value = again && !up ? "up" : "down";
          limit = PAGE;
          update();
        };
      }
    }
    const refresh = () => { limit = PAGE; update(); };
    form.addEventListener("input", refresh);
    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(refresh));
    next.onclick = () => { limit += PAGE; update(); };
    every.onclick = () => { limit = cards.length; update(); };
    form.hidden = false;
    update();
  }

  // ---- losses ----
  // Reading a loss curve: the nearest logged step under the pointer.
  for (const chart of all("[data-curve]")) {
    const svg = chart.querySelector("svg"), reading = chart.querySelector(".reading");
    if (!svg) continue;
    const points = JSON.parse(chart.dataset.curve), cursor = svg.querySelector(".cursor"), rest = reading.textContent;
    const { left, right, width } = svg.dataset, first = points[0][0], last = Math.max(points[points.length - 1][0], first + 1);
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
      const at = first + (x - left) / (width - left - right) * (last - first);
      const near = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      const px = Number(left) + (near[0] - first) / (last - first) * (width - left - right);
      cursor.setAttribute("x1", px); cursor.setAttribute("x2", px); cursor.classList.add("on");
      reading.textContent = `step ${near[0]}: loss ${near[1].toPrecision(3)}`;
    });
    svg.addEventListener("pointerleave", () => { cursor.classList.remove("on"); reading.textContent = rest; });
  }
})();
