"use strict";
// Keys 1, 2 and 0. A page is deaf for its first half second, and a form is sent once: a double click or a held key that
// judged one question does not judge the next. Without this script the pages work all the same.
{
  const DEAF = 500;
  const shown = performance.now();
  const form = document.getElementById("judge");
  const early = () => performance.now() - shown < DEAF;
  let sent = false;

  addEventListener("pageshow", () => { sent = false; });
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
    if (!form || event.repeat || event.ctrlKey || event.altKey || event.metaKey || early()) return;
    if (event.target.closest("textarea, input, select")) return;
    const button = form.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
    if (button) {
      event.preventDefault();
      form.requestSubmit(button);
    }
  });
  if (form && document.activeElement === document.body) document.getElementById("question").focus();
  const status = document.querySelector("[role=status]");
  if (status && status.textContent) {  // what stands there from the start is read out by nobody
    const said = status.textContent;
    status.textContent = "";
    setTimeout(() => { status.textContent = said; }, 100);
  }
}
