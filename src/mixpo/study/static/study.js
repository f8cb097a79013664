"use strict";
// Keys 1, 2 and 0, unless switched off, where no other control has the focus. A page ignores input for its first
// half second, and a form is submitted once: a double click or a held key judges one question only. The pages also work without
// this script.
{
  const IGNORE_MS = 500;
  const loadedAt = performance.now();
  const form = document.getElementById("judge");
  const keys = document.getElementById("keys");
  const isEarly = () => performance.now() - loadedAt < IGNORE_MS;
  let submitted = false;

  addEventListener("pageshow", (event) => {
    submitted = false;
    if (form && event.persisted) location.reload();  // restored from the browser's cache: its form may be used already
  });
  document.addEventListener("click", (event) => {
    if (isEarly() && event.target.closest("button")) event.preventDefault();
  }, true);
  document.addEventListener("submit", (event) => {
    if (submitted || isEarly()) event.preventDefault();
    else {
      submitted = true;
      setTimeout(() => { submitted = false; }, 3000);  // the connection may be lost; the form itself counts once
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.repeat && event.target.closest("button")) event.preventDefault();
    if (!form || !keys.checked || event.repeat || event.ctrlKey || event.altKey || event.metaKey || isEarly()) return;
    if (!event.target.matches("body, #question, #judge button")) return;
    const button = form.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
    if (button) {
      event.preventDefault();
      form.requestSubmit(button);
    }
  });
  const updateHints = () => {
    for (const button of form.querySelectorAll("[data-key]")) {
      button.querySelector("kbd").hidden = !keys.checked;
      if (keys.checked) button.setAttribute("aria-keyshortcuts", button.dataset.key);
      else button.removeAttribute("aria-keyshortcuts");
    }
  };
  if (form) {
    keys.checked = localStorage.getItem("keys") !== "off";
    keys.closest("label").hidden = false;
    keys.addEventListener("change", () => {
      localStorage.setItem("keys", keys.checked ? "on" : "off");
      updateHints();
    });
    updateHints();
  }
  if (form && document.activeElement === document.body) document.getElementById("question").focus();
  const status = document.querySelector("[role=status]");
  if (status && status.textContent) {  // screen readers announce changes, not initial content
    const message = status.textContent;
    status.textContent = "";
    setTimeout(() => { status.textContent = message; }, 100);
  }
}
