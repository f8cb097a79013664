"use strict";
// Keys 1, 2 and 0, unless switched off, where nothing else that listens has the focus. A page is deaf for its first half
// second, and a form is sent once: a double click or a held key that judged one question does not judge the next.
// Without this script the pages work all the same.
{
  const DEAF = 500;
  const shown = performance.now();
  const form = document.getElementById("judge");
  const keys = document.getElementById("keys");
  const early = () => performance.now() - shown < DEAF;
  let sent = false;

  addEventListener("pageshow", (event) => {
    sent = false;
    if (form && event.persisted) location.reload();  // brought back by the browser: its form may have been used
  });
  document.addEventListener("click", (event) => {
    if (early() && event.target.closest("button")) event.preventDefault();
  }, true);
  document.addEventListener("submit", (event) => {
    if (sent || early()) event.preventDefault();
    else {
      sent = true;
      setTimeout(() => { sent = false; }, 3000);  // the connection may be lost; the form itself counts once
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.repeat && event.target.closest("button")) event.preventDefault();
    if (!form || !keys.checked || event.repeat || event.ctrlKey || event.altKey || event.metaKey || early()) return;
    if (!event.target.matches("body, #question, #judge button")) return;
    const button = form.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
    if (button) {
      event.preventDefault();
      form.requestSubmit(button);
    }
  });
  const show = () => {
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
      show();
    });
    show();
  }
  if (form && document.activeElement === document.body) document.getElementById("question").focus();
  const status = document.querySelector("[role=status]");
  if (status && status.textContent) {  // what stands there from the start is read out by nobody
    const said = status.textContent;
    status.textContent = "";
    setTimeout(() => { status.textContent = said; }, 100);
  }
}
