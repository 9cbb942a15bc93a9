// What every page has: theme switch, menus that close, messages that can be dismissed, relative times, the live region,
// and the banner that says when the site cannot be reached. Other scripts use:
//
//   kangaroo.announce(text)       say it in the polite live region
//   kangaroo.connection(ok)       tell the banner that a request of one's own failed or came back
//   "kangaroo:theme"              on document, after the theme changed
(() => {
  const { kangaroo } = window;
  const $ = (id) => document.getElementById(id);

  kangaroo.announce = (text) => {
    const live = $("live");
    // A region that already holds this very text would stay silent.
    live.textContent = live.textContent === text ? `${text}\u00a0` : text;
  };

  // Theme ------------------------------------------------------------------------------------------------------------
  const button = $("theme-switch");
  const label = () => {
    const other = document.documentElement.dataset.bsTheme === "dark" ? "light" : "dark";
    button.setAttribute("aria-label", `Switch to the ${other} theme`);
    button.title = button.getAttribute("aria-label");
  };
  if (button) {
    label();
    button.addEventListener("click", kangaroo.switchTheme);
    document.addEventListener("kangaroo:theme", label);
  }

  // Menus (<details class="menu">) and messages ----------------------------------------------------------------------
  document.addEventListener("click", (event) => {
    for (const menu of document.querySelectorAll("details.menu[open]")) {
      if (!menu.contains(event.target)) menu.open = false;
    }
    const dismiss = event.target.closest("[data-dismiss]");
    if (dismiss) {
      dismiss.closest(".alert").remove();
      $("main").focus({ preventScroll: true });
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const menu of document.querySelectorAll("details.menu[open]")) {
      menu.open = false;
      menu.querySelector("summary").focus();
    }
  });

  // <time datetime>: relative, or with data-of-day by the clock; exact on hover, in the reader's zone -----------------
  const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
  const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
  const ofDay = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
  const ofAnotherDay = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const byClock = (date) => (date.toDateString() === new Date().toDateString() ? ofDay : ofAnotherDay).format(date);
  const UNITS = [["year", 31536000], ["month", 2592000], ["day", 86400], ["hour", 3600], ["minute", 60]];
  const phrase = (date) => {
    const seconds = (date - Date.now()) / 1000;
    for (const [unit, size] of UNITS) {
      if (Math.abs(seconds) >= size) return relative.format(Math.trunc(seconds / size), unit);
    }
    return "just now";
  };
  const times = (root) => {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const date = new Date(time.dateTime);
      if (Number.isNaN(date.getTime())) continue;
      const text = "ofDay" in time.dataset ? byClock(date) : phrase(date);
      if (time.textContent !== text) time.textContent = text;
      if (!time.title) time.title = exact.format(date);
    }
  };
  times(document);
  setInterval(() => document.hidden || times(document), 20_000);
  document.addEventListener("visibilitychange", () => document.hidden || times(document));
  document.addEventListener("htmx:load", (event) => times(event.detail.elt.parentElement ?? event.detail.elt));

  // Connection -------------------------------------------------------------------------------------------------------
  const banner = $("offline");
  let lost = false;
  kangaroo.connection = (ok) => {
    if (ok === !lost) return;
    lost = !ok;
    banner.hidden = ok;
    kangaroo.announce(ok ? "Connected again." : "The site cannot be reached. What is shown may be old.");
  };
  addEventListener("offline", () => kangaroo.connection(false));
  addEventListener("online", () => kangaroo.connection(true));
  document.addEventListener("htmx:sendError", () => kangaroo.connection(false));
  document.addEventListener("htmx:timeout", () => kangaroo.connection(false));
  document.addEventListener("htmx:beforeOnLoad", () => kangaroo.connection(true));
  if (!navigator.onLine) kangaroo.connection(false);
})();
