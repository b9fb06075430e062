// The report's movement: videos that belong together play together; losses can be read off. Works without it, too.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let playing = !still, slow = false;
  const seen = new Set();

  // Clips that belong together start together, and wait for the longest before they start again.
  const groups = all("[data-together]").map(root => ({ root, videos: all("video", root) })).filter(g => g.videos.length);
  const run = video => { const promise = video.play(); if (promise) promise.catch(() => {}); };
  const restart = group => group.videos.forEach(video => { video.currentTime = 0; if (playing) run(video); });
  const apply = group => group.videos.forEach(video => {
    video.playbackRate = slow ? 0.5 : 1;
    if (playing && seen.has(group.root)) { if (!video.ended) run(video); } else video.pause();
  });
  for (const group of groups) {
    for (const video of group.videos) {
      video.loop = false;
      video.addEventListener("ended", () => {
        if (playing && group.videos.every(v => v.ended || v.error)) setTimeout(() => { if (playing && seen.has(group.root)) restart(group); }, 250);
      });
    }
  }
  const watcher = new IntersectionObserver(entries => {
    for (const entry of entries) {
      const group = groups.find(g => g.root === entry.target);
      if (entry.isIntersecting) { seen.add(entry.target); apply(group); if (playing) restart(group); }
      else { seen.delete(entry.target); apply(group); }
    }
  }, { rootMargin: "80px" });
  groups.forEach(group => watcher.observe(group.root));

  const controls = document.querySelector(".controls");
  const [play, back, forth, half, crisp] = all("button", controls);
  controls.hidden = groups.length === 0;
  const show = () => {
    play.textContent = playing ? "Pause" : "Play";
    half.setAttribute("aria-pressed", slow);
    crisp.setAttribute("aria-pressed", document.body.classList.contains("crisp"));
    groups.forEach(apply);
  };
  const toggle = () => { playing = !playing; show(); if (playing) groups.filter(g => seen.has(g.root) && g.videos.every(v => v.ended)).forEach(restart); };
  const step = by => {
    playing = false; show();
    groups.filter(g => seen.has(g.root)).forEach(g => g.videos.forEach(video => {
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
