// Keeps a page live without making it jump.
//
// One clock: every element with data-poll is sent "kangaroo:poll" every 2 seconds, every 15 while the page is hidden,
// with back-off up to 30 while the site does not answer, and no more once it has heard "kangaroo:settled". What asks
// for itself (the chart) answers each poll with "kangaroo:polled", detail {ok}; for htmx that is read off its requests.
//
// Polls are answered in pieces that replace parts of the page. What was open stays open, what was scrolled stays there,
// a part in which text is being selected waits its turn; focus is kept by htmx, by id.
const VISIBLE = 2_000;
const HIDDEN = 15_000;
const MOST = 30_000;

class Poller {
  constructor(element) {
    this.element = element;
    this.failures = 0;
    element.addEventListener("kangaroo:settled", () => this.stop());
    element.addEventListener("kangaroo:polled", (event) => this.answered(event.detail.ok));
    element.addEventListener("htmx:afterRequest", (event) => {
      const status = event.detail.xhr.status;
      if (status === 404 || status === 403) {
        this.stop();
        location.reload(); // gone, or signed out: the page says so properly
        return;
      }
      this.answered(Boolean(event.detail.successful));
    });
    this.plan();
  }

  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
  }

  get delay() {
    const base = document.hidden ? HIDDEN : VISIBLE;
    return this.failures ? Math.min(MOST, base * 2 ** this.failures) : base;
  }

  plan(delay = this.delay) {
    clearTimeout(this.timer);
    if (this.stopped || !this.element.isConnected) return;
    // A request that is never answered at all must not end the polling.
    this.timer = setTimeout(() => {
      this.plan(MOST);
      this.element.dispatchEvent(new CustomEvent("kangaroo:poll"));
    }, delay);
  }

  answered(ok) {
    this.failures = ok ? 0 : this.failures + 1;
    this.plan();
  }
}

const pollers = new Map();
const watch = (element) => {
  if (!pollers.has(element)) pollers.set(element, new Poller(element));
};
document.querySelectorAll("[data-poll]").forEach(watch);
document.addEventListener("kangaroo:watch", (event) => watch(event.target));

// Seen again, or connected again: do not wait out what is left of a long delay.
const soon = () => {
  for (const poller of pollers.values()) poller.plan(document.hidden ? poller.delay : 100);
};
document.addEventListener("visibilitychange", soon);
addEventListener("online", soon);

// Swaps that leave the reader alone ------------------------------------------------------------------------------------
const before = new Map();
const says = (root) => root?.dataset?.says ?? root?.querySelector?.("[data-says]")?.dataset.says;

const selecting = (target) => {
  const selection = document.getSelection();
  return selection && !selection.isCollapsed && selection.rangeCount > 0 && selection.getRangeAt(0).intersectsNode(target);
};

document.addEventListener("htmx:oobBeforeSwap", (event) => {
  const { target } = event.detail;
  if (selecting(target)) {
    event.detail.shouldSwap = false;
    skipped = true;
    return;
  }
  const kept = [...target.querySelectorAll("[id]")];
  before.set(target.id, {
    says: says(target),
    open: new Map(kept.filter((e) => e.tagName === "DETAILS").map((e) => [e.id, e.open])),
    scroll: kept.filter((e) => e.scrollTop || e.scrollLeft).map((e) => [e.id, e.scrollTop, e.scrollLeft]),
  });
});

document.addEventListener("htmx:oobAfterSwap", (event) => {
  const { id } = event.detail.target;
  const was = before.get(id);
  const target = document.getElementById(id);
  before.delete(id);
  if (!was || !target) return;
  for (const [key, open] of was.open) {
    const details = document.getElementById(key);
    if (details) details.open = open;
  }
  for (const [key, top, left] of was.scroll) document.getElementById(key)?.scrollTo({ top, left, behavior: "instant" });
  const now = says(target);
  if (now && was.says && now !== was.says) kangaroo.announce(now);
});

// A part that was skipped is asked for again: the page must not claim to have shown all of this version.
let skipped = false;
document.addEventListener("htmx:afterRequest", () => {
  const version = document.getElementById("version");
  if (skipped && version) version.value = "all:";
  skipped = false;
});

// Dialogs --------------------------------------------------------------------------------------------------------------
document.addEventListener("click", (event) => {
  const opener = event.target.closest("[data-opens]");
  if (opener) {
    event.preventDefault();
    document.getElementById(opener.dataset.opens).showModal();
  }
  const closer = event.target.closest("[data-closes]");
  if (closer?.closest("dialog")) {
    event.preventDefault();
    closer.closest("dialog").close();
  }
});
const asked = document.querySelector("dialog[open]");
if (asked) {
  asked.close(); // drawn open for those without JavaScript; here it becomes a real dialog
  asked.showModal();
}
