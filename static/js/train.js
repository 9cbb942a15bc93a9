// The Train page with JavaScript: presets fill the form in place and can be undone, what was typed survives leaving,
// problems found while typing stand beside their fields, and one click starts one experiment. Without it the page
// works by whole reloads. The side sheet itself is HTMX: see templates/experiments/train.html.

const form = document.getElementById("experiment");
const sheet = document.getElementById("sheet");
const DRAFT = "kangaroo-train-draft";
/** Fields whose errors the sheet knows nothing of. */
const NOT_THE_SHEETS = new Set(["id_upload", "id_target_multiple", "id_growths"]);
/** Belongs to this very page, or cannot be filled in by a script. */
const OWN = new Set(["csrfmiddlewaretoken", "key", "upload"]);
const MODELS_DIMENSIONS = ["d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "n_layers"];

// Values: read all, fill all -----------------------------------------------------------------------------------------

const controls = (root = form) =>
  [...root.elements].filter((control) => control.name && !OWN.has(control.name) && control.type !== "submit");

/** Every value of the form by name; a checkbox is true or false. */
function read(root = form) {
  const values = {};
  for (const control of controls(root)) {
    if (control.type === "checkbox") values[control.name] = control.checked;
    else if (control.type !== "radio") values[control.name] = control.value;
    else if (control.checked) values[control.name] = control.value;
  }
  return values;
}

function fill(values) {
  for (const control of controls()) {
    if (!(control.name in values)) continue;
    const value = values[control.name];
    if (control.type === "checkbox") control.checked = value;
    else if (control.type === "radio") {
      control.checked = control.value === value;
      if (control.checked) control.disabled = false; // what is disabled would not be sent
    }
    else control.value = value;
  }
  // A choice is not left out of sight.
  for (const choice of form.querySelectorAll(".others :checked")) choice.closest("details").open = true;
  form.dispatchEvent(new Event("input", { bubbles: true }));
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

// What fills the form: presets, proposals, a draft --------------------------------------------------------------------

const filled = document.getElementById("filled");
let before = null;

/** The form of a page of this site as the values of this one, with as many stages as it has. */
function adopt(page) {
  const stages = page.getElementById("stages");
  document.getElementById("stages").replaceWith(document.adoptNode(stages));
  const target = page.getElementById("target_said");
  document.getElementById("target_said").textContent = target.textContent;
  const advanced = document.getElementById("growth-advanced");
  advanced.open ||= page.getElementById("growth-advanced").open;
}

async function fetched(url, options = {}) {
  const answer = await fetch(url, { credentials: "same-origin", ...options });
  if (!answer.ok) throw new Error(answer.statusText);
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

/** The page with these values and what a button proposes. */
async function proposed(values, proposal) {
  const sent = new FormData();
  for (const name of ["csrfmiddlewaretoken", "key"]) sent.set(name, form.elements[name].value);
  for (const [name, value] of Object.entries(values)) {
    if (value !== false) sent.set(name, value === true ? "on" : value);
  }
  sent.set("propose", proposal);
  return fetched(form.action, { method: "POST", body: sent });
}

/** Show values that may have another number of stages than the form has rows for. */
async function show(values) {
  if ((values.rungs ?? "0") !== form.elements.rungs.value) adopt(await proposed(values, ""));
  fill(values);
}

function sayFilled(text, link) {
  filled.firstElementChild.textContent = text;
  filled.hidden = false;
  mark(link);
  window.kangaroo?.announce(text);
}

form.addEventListener("click", async (event) => {
  const button = event.target.closest?.("button[name=propose]");
  if (!button) return;
  event.preventDefault();
  let page;
  const values = read();
  try {
    page = await proposed(values, button.value);
  } catch {
    return form.requestSubmit(button); // the browser says best what is wrong
  }
  const current = document.querySelector("[data-preset][aria-current]");
  const answer = Object.entries(read(page.getElementById("experiment")));
  const changed = answer.filter(([name, value]) => value !== values[name]); // what was typed meanwhile stays
  const standing = read();
  adopt(page);
  if (changed.length === 0) {
    form.dispatchEvent(new Event("input", { bubbles: true }));
  } else {
    before = { values: standing, current };
    fill(Object.fromEntries(changed));
    const said = document.getElementById("target_said").textContent;
    sayFilled(button.value === "target" ? `Filled in a shape for large: ${said}` : "Filled in.", null);
  }
  for (const id of ["id_target_multiple", "id_growths"]) {
    say(id, page.getElementById(`${id}_error`)?.textContent ?? "");
  }
  // The button may be gone: there is nothing left to choose, or no such stage.
  const next = button.value === "growth" ? "[name=width]:checked" : `button[value="${button.value}"]`;
  (document.querySelector(next) ?? form.elements.growths).focus();
});

// Enter in a field beside such a button presses it.
form.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !event.target.matches?.(".propose input")) return;
  event.preventDefault();
  event.target.closest(".propose").querySelector("button").click();
});

// Presets ------------------------------------------------------------------------------------------------------------

for (const link of document.querySelectorAll("[data-preset]")) {
  link.addEventListener("click", async (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab of its own: let it
    event.preventDefault();
    let page;
    try {
      page = await fetched(link.href);
    } catch {
      window.location = link.href; // the browser says best what is wrong
      return;
    }
    before = { values: read(), current: document.querySelector("[data-preset][aria-current]") };
    const values = read(page.getElementById("experiment"));
    adopt(page);
    fill(values);
    sayFilled(`Filled with “${link.textContent}”.`, link);
  });
}

filled.querySelector("button").addEventListener("click", async () => {
  await show(before.values);
  mark(before.current);
  filled.hidden = true;
  form.elements.name.focus();
});

function mark(link) {
  for (const other of document.querySelectorAll("[data-preset]")) other.removeAttribute("aria-current");
  link?.setAttribute("aria-current", "true");
}

// Small beside large: how they stand to each other -------------------------------------------------------------------

function compare() {
  for (const row of form.querySelectorAll("[data-row]")) {
    const [small, large] = ["small", "large"].map((role) => {
      const text = form.elements[`${role}_${row.dataset.row}`].value.replace(/[\s_]/g, "");
      return text === "" ? NaN : Number(text);
    });
    const differ = small !== large && small > 0 && Number.isFinite(large);
    row.classList.toggle("differs", differ);
    row.querySelector(".ratio").textContent = differ ? `× ${Number((large / small).toPrecision(3))}` : "";
  }
}
form.addEventListener("input", compare);

// A checkpoint says itself what small is -----------------------------------------------------------------------------

let dimensions = null;
form.addEventListener("change", (event) => {
  if (event.target.name !== "small_source") return;
  if (event.target.value === "checkpoint") {
    dimensions = read();
    for (const name of MODELS_DIMENSIONS) form.elements[`small_${name}`].value = "";
    if (!form.elements.tokenizer_name.value) fill({ tokenizer_kind: "pretrained" });
  } else if (dimensions) {
    for (const name of MODELS_DIMENSIONS) {
      const field = form.elements[`small_${name}`];
      if (!field.value) field.value = dimensions[`small_${name}`];
    }
    if (!form.elements.tokenizer_name.value) fill({ tokenizer_kind: dimensions.tokenizer_kind });
  }
  compare();
});

// Problems beside their fields, as the sheet finds them --------------------------------------------------------------

/** The element that carries an error of `id`: the control, or the fieldset of a choice. */
function say(id, message) {
  const target = document.getElementById(id);
  if (!target) return;
  let line = document.getElementById(`${id}_error`);
  if (!message) {
    if (!line) return;
    line.remove();
    target.removeAttribute("aria-invalid");
    describe(target, `${id}_error`, false);
    return;
  }
  if (!line) {
    line = document.createElement("p");
    line.className = "field-error";
    line.id = `${id}_error`;
    const row = target.closest("[data-row], [data-stage]");
    if (row) row.querySelector(".shape-errors").append(line);
    else (target.closest(".field") ?? target.parentElement).append(line);
  }
  if (line.textContent !== message) line.textContent = message;
  if (target.tagName !== "FIELDSET") target.setAttribute("aria-invalid", "true");
  describe(target, `${id}_error`, true);
}

function describe(target, id, on) {
  const ids = new Set((target.getAttribute("aria-describedby") ?? "").split(" ").filter(Boolean));
  if (on) ids.add(id);
  else ids.delete(id);
  if (ids.size) target.setAttribute("aria-describedby", [...ids].join(" "));
  else target.removeAttribute("aria-describedby");
}

/** A rule that leads nowhere for these shapes cannot be chosen; one that is chosen stays, with its problem. */
function closeRules() {
  for (const card of form.querySelectorAll(".choice-body[id]")) {
    const radio = card.parentElement.querySelector("input[type=radio]");
    radio.disabled = "closed" in card.dataset && !radio.checked;
  }
}

let problems = sheet.querySelectorAll("#problems li").length;
sheet.addEventListener("htmx:afterSwap", () => {
  closeRules();
  const found = new Map();
  for (const link of sheet.querySelectorAll("#problems a")) {
    const id = link.hash.slice(1);
    if (!found.has(id)) found.set(id, link.textContent);
  }
  for (const line of form.querySelectorAll(".field-error[id$='_error']")) {
    const id = line.id.slice(0, -"_error".length);
    if (!found.has(id) && !NOT_THE_SHEETS.has(id)) say(id, "");
  }
  for (const [id, message] of found) {
    // A field that is still being typed in is not scolded yet.
    const active = document.activeElement?.id === id;
    if (!active || document.getElementById(`${id}_error`)) say(id, message);
  }
  const count = sheet.querySelectorAll("#problems li").length;
  if (count !== problems) {
    window.kangaroo?.announce(count === 0 ? "No problems." : count === 1 ? "1 problem." : `${count} problems.`);
  }
  problems = count;
});

// Links to fields: open what is folded, and put the focus into the field ---------------------------------------------

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("#problems a, #summary a");
  if (!link) return;
  const target = document.getElementById(link.hash.slice(1));
  if (!target) return;
  event.preventDefault();
  const folded = target.closest("details");
  if (folded) folded.open = true;
  const control = target.matches("fieldset") ? target.querySelector(":checked, input") : target;
  control.focus();
  control.scrollIntoView({ block: "center" });
});
document.getElementById("summary")?.focus();

// An upload that is too large is refused before it travels -----------------------------------------------------------

form.elements.upload.addEventListener("change", ({ target }) => {
  const [file] = target.files;
  const most = Number(target.dataset.maxMb);
  const size = file ? file.size / 1e6 : 0;
  const message = `${file?.name} has ${Math.ceil(size)} MB: at most ${most} MB can be uploaded`;
  say(target.id, size > most ? message : "");
});

// What was typed survives leaving the page ---------------------------------------------------------------------------

const start = read();
const box = document.getElementById("draft");
const storage = (() => {
  try {
    return window.sessionStorage;
  } catch {
    return null; // refused by the browser: nothing is kept, nothing breaks
  }
})();
let waiting = null;
let sending = false;

function keep() {
  const values = read();
  try {
    if (same(values, start) && !("bound" in form.dataset)) storage?.removeItem(DRAFT);
    else storage?.setItem(DRAFT, JSON.stringify({ values, sent: sending }));
  } catch {
    // full: the page itself still has everything
  }
}
form.addEventListener("input", () => {
  box.hidden = true; // whoever types has made up their mind
  clearTimeout(waiting);
  waiting = setTimeout(keep, 250);
});
window.addEventListener("pagehide", () => waiting && !sending && keep());

const draft = (() => {
  try {
    return JSON.parse(storage?.getItem(DRAFT) ?? "null");
  } catch {
    return null;
  }
})();
// What was sent is an experiment by now, unless somebody comes back to it: the site could not be reached, or it is to be
// started again with changes.
const cameBack = performance.getEntriesByType("navigation")[0]?.type === "back_forward";
if ("bound" in form.dataset) keep();
else if (draft?.sent && !cameBack) storage?.removeItem(DRAFT);
else if (draft && !same(draft.values, start)) box.hidden = false;
box.querySelector("[data-restore]").addEventListener("click", async () => {
  box.hidden = true;
  await show(draft.values);
  form.elements.name.focus();
});
box.querySelector("[data-discard]").addEventListener("click", () => {
  box.hidden = true;
  storage?.removeItem(DRAFT);
  form.elements.name.focus();
});

// One click, one experiment ------------------------------------------------------------------------------------------

const button = form.querySelector("button.btn-primary");
const label = button.textContent;
form.addEventListener("submit", (event) => {
  if (event.submitter?.name === "propose") return;
  if (sending) {
    event.preventDefault();
    return;
  }
  sending = true;
  button.setAttribute("aria-disabled", "true");
  button.textContent = form.elements.upload.files.length ? "Uploading and starting…" : "Starting…";
  clearTimeout(waiting);
  keep();
});
window.addEventListener("pageshow", () => {
  // Also when the page comes back from the browser's memory.
  sending = false;
  button.removeAttribute("aria-disabled");
  button.textContent = label;
});
