// The lineage's movement: whoever follows an arrow finds its end open, and all parts open and close at once. Without it
// everything is there all the same.
"use strict";
(() => {
  const nodes = [...document.querySelectorAll(".node")], button = document.querySelector(".controls button");
  const follow = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    const node = target && target.closest(".node");
    if (!node) return;
    node.open = true;
    node.querySelector("summary").focus({ preventScroll: true });
    node.scrollIntoView();
  };
  const show = () => {
    const open = nodes.every(node => node.open);
    button.textContent = open ? "Close all" : "Open all";
    button.setAttribute("aria-expanded", open);
  };
  nodes.forEach(node => node.addEventListener("toggle", show));
  button.onclick = () => { const open = !nodes.every(node => node.open); nodes.forEach(node => { node.open = open; }); };
  button.hidden = false;
  addEventListener("hashchange", follow);
  follow();
  show();
})();
