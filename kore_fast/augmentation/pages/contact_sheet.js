"use strict";
const cards = Array.from(document.querySelectorAll("article"));
const controls = {
  branch: document.getElementById("branch"),
  item: document.getElementById("item"),
  flag: document.getElementById("flag"),
  text: document.getElementById("text"),
};
const size = Number(document.body.dataset.page);
let page = 0;

function show() {
  const words = controls.text.value.toLowerCase();
  const fitting = cards.filter(card =>
    (!controls.branch.value || card.dataset.branch === controls.branch.value) &&
    (!controls.item.value || card.dataset.item === controls.item.value) &&
    (!controls.flag.value || JSON.parse(card.dataset.flags).includes(controls.flag.value)) &&
    (!words || card.textContent.toLowerCase().includes(words)));
  const pages = Math.max(1, Math.ceil(fitting.length / size));
  page = Math.min(Math.max(page, 0), pages - 1);
  const shown = new Set(fitting.slice(page * size, (page + 1) * size));
  for (const card of cards) card.hidden = !shown.has(card);
  const count = fitting.length === 1 ? "1 sample" : fitting.length + " samples";
  document.getElementById("where").textContent =
    count + (pages > 1 ? ", page " + (page + 1) + " of " + pages : "");
  document.getElementById("none").hidden = fitting.length > 0;
  document.getElementById("previous").disabled = page === 0;
  document.getElementById("next").disabled = page >= pages - 1;
}

function turn(by) {
  page += by;
  show();
  window.scrollTo(0, 0);
}

for (const control of Object.values(controls)) control.addEventListener("input", () => { page = 0; show(); });
document.getElementById("previous").addEventListener("click", () => turn(-1));
document.getElementById("next").addEventListener("click", () => turn(1));
show();
