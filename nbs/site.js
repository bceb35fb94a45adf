// What every page does in a browser: code can be copied, and what scrolls sideways says so.

const CODE = "article .cell_input .highlight, article div[class*='highlight-'] > .highlight"
const SCROLLS = `pre, .table-wrapper, .output, .cell_output, .cell-output-display, div.math,
  mjx-container`
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

function hiddenOf(box) {
  const hidden = box.scrollWidth - box.clientWidth
  const scrolls = hidden > 1 && getComputedStyle(box).overflowX !== "visible"
  return { box, scrolls, more: scrolls && hidden - box.scrollLeft > 1 }
}

function mark({ box, scrolls, more }) {
  box.toggleAttribute("data-more", more)
  if (scrolls) box.tabIndex = 0
  else if (box.tabIndex === 0) box.removeAttribute("tabindex")
}

// called once a box is laid out; all are looked at before any is marked, so that nothing waits
const sizes = new ResizeObserver(found => {
  found.map(({ target }) => hiddenOf(target)).forEach(mark)
})

function watch(box) {
  box.addEventListener("scroll", () => mark(hiddenOf(box)), { passive: true })
  sizes.observe(box)
}

const COLUMNS = /\S {2,}\S/  // two spaces in a line: a table, which must not wrap

function wrapProse(printed) {
  printed.classList.toggle("prose", !COLUMNS.test(printed.textContent))
}

// Tables: what is short is not parted, and on a phone a sentence has the width of the page.

const SHORT = 12, SENTENCE = 20  // characters
const textOf = cell => cell.textContent.trim()

function fitCell(cell) {
  const { length } = textOf(cell)
  cell.classList.toggle("whole", length <= SHORT)
  cell.classList.toggle("room", length > SENTENCE)
}

function hasSentences(cells) {
  const lengths = cells.map(cell => textOf(cell).length)
  return lengths.reduce((sum, length) => sum + length, 0) > SENTENCE * lengths.length
}

function fitTable(table) {
  const rows = [...table.tBodies].flatMap(body => [...body.rows]).map(row => [...row.cells])
  rows.flat().forEach(fitCell)
  const heads = [...table.tHead?.rows ?? []].map(row => [...row.cells].map(textOf))
  const count = heads[0]?.length
  if (heads.length !== 1 || rows.some(row => row.length !== count)) return
  const columns = heads[0].map((_, i) => rows.map(row => row[i]))
  const ofArguments = heads[0][0] === "" && /^(Type|Details)$/.test(heads[0][1])
  if (!ofArguments && !columns.slice(1).some(hasSentences)) return
  table.classList.add("stacked")
  columns.forEach((cells, i) => {
    const name = heads[0][i].replace(/^[A-Z](?=[a-z]+$)/, first => first.toLowerCase())
    for (const cell of cells) {
      if (ofArguments) cell.classList.remove("room")
      if (name === "details") cell.classList.add("below")
      else if (i && name) cell.dataset.head = name
    }
  })
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
  document.querySelectorAll("article table").forEach(fitTable)
  document.querySelectorAll(SCROLLS).forEach(watch)
}

if (document.readyState === "loading") addEventListener("DOMContentLoaded", start)
else start()
