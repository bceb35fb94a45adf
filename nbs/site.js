// What every page does in a browser: code can be copied, and what scrolls sideways says so.

const CODE = "article .cell_input .highlight, article div[class*='highlight-'] > .highlight"
const SCROLLS = "pre, .table-wrapper, .output, .cell-output-display, div.math, mjx-container"
const PRINTED = ".cell_output .output pre, .cell-output pre"

function select(element) {
  const range = document.createRange()
  range.selectNodeContents(element)
  getSelection().removeAllRanges()
  getSelection().addRange(range)
}

function addCopyButton(block) {  // Quarto brings its own
  if (block.closest(".cell_output") || block.querySelector("button.copy")) return
  const code = block.querySelector("pre")
  const text = code.textContent
  const button = document.createElement("button")
  Object.assign(button, { className: "copy", type: "button", textContent: "Copy" })
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text)
      button.textContent = "Copied"
    } catch {  // not allowed here: then the reader copies what is selected
      select(code)
      button.textContent = "Selected"
    }
    setTimeout(() => { button.textContent = "Copy" }, 1500)
  })
  block.append(button)
}

function markHidden(box) {
  const hidden = box.scrollWidth - box.clientWidth
  const scrolls = hidden > 1 && getComputedStyle(box).overflowX !== "visible"
  box.toggleAttribute("data-more", scrolls && hidden - box.scrollLeft > 1)
  if (scrolls) box.tabIndex = 0
  else if (box.tabIndex === 0) box.removeAttribute("tabindex")
}

function watch(box) {
  const mark = () => markHidden(box)
  mark()
  box.addEventListener("scroll", mark, { passive: true })
  new ResizeObserver(mark).observe(box)
}

const COLUMNS = /\S {2,}\S/  // two spaces in a line: a table, which must not wrap

function wrapProse(printed) {
  printed.classList.toggle("prose", !COLUMNS.test(printed.textContent))
}

const STILL = "a:has(img[src*='still.'])"  // a click plays it in place

function play(event) {
  if (innerWidth < 740) return  // too narrow for its controls: the link leads to its page
  event.preventDefault()
  const frame = document.createElement("iframe")
  Object.assign(frame, { src: "explorer/index.html", title: "The explorer", className: "explorer" })
  event.currentTarget.replaceWith(frame)
}

function start() {
  document.querySelectorAll(STILL).forEach(link => link.addEventListener("click", play))
  document.querySelectorAll(PRINTED).forEach(wrapProse)
  document.querySelectorAll(CODE).forEach(addCopyButton)
  document.querySelectorAll(SCROLLS).forEach(watch)
}

if (document.readyState === "loading") addEventListener("DOMContentLoaded", start)
else start()
