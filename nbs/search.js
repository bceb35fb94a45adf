// The page of search results: the best pages for the words of a query, from INDEX.

const SHOWN = 30
const WEIGHTS = { title: 12, heading: 5, description: 4 }
const ENDINGS = /(ities|ity|ings?|ed|es|s)$/

function stem(word) {
  return word.length > 4 ? word.replace(ENDINGS, "") : word
}

function wordsOf(text) {
  return text.toLowerCase().match(/[a-z][a-z0-9_]+/g) ?? []
}

function matches(text, word) {  // how much of a short text a word is, and whether it is there at all
  const all = wordsOf(text)
  const hits = all.filter(other => other === word || stem(other) === stem(word)).length
  return hits ? 0.5 + 0.5 * hits / all.length : 0
}

function counts(word) {  // page -> how often, for a word and its other forms
  const found = new Map()
  for (const [other, postings] of Object.entries(INDEX.words)) {
    const share = other === word ? 1 : stem(other) === stem(word) ? 0.7
      : word.length > 3 && other.includes(word) ? 0.3 : 0
    for (let i = 0; share && i < postings.length; i += 3) {
      const page = parseInt(postings.slice(i, i + 2), 36)
      const count = share * parseInt(postings[i + 2], 36)
      found.set(page, (found.get(page) ?? 0) + count)
    }
  }
  return found
}

function scoreOf(page, number, terms) {  // of a page: its score, and the heading that fits best
  const [file, title, description, headings] = page
  let score = 0, best = { fit: 0, heading: null }
  for (const { word, found, rare } of terms) {
    const count = found.get(number) ?? 0
    const fits = headings.map(([heading]) => matches(heading, word))
    const fit = Math.max(0, ...fits)
    if (fit > best.fit) best = { fit, heading: headings[fits.indexOf(fit)] }
    const part = WEIGHTS.title * matches(title, word) + WEIGHTS.heading * fit
      + WEIGHTS.description * matches(description, word) + rare * 4 * count / (count + 6)
    if (!part) return { score: 0 }  // every word must be there
    score += part
  }
  const kind = file.startsWith("module_") ? 0.4 : 1
  return { score: score * kind, heading: best.heading }
}

function search(query) {
  const terms = [...new Set(wordsOf(query))].map(word => {
    const found = counts(word)
    return { word, found, rare: Math.log(1 + INDEX.pages.length / (1 + found.size)) }
  })
  if (!terms.length) return []
  return INDEX.pages
    .map((page, number) => ({ page, ...scoreOf(page, number, terms) }))
    .filter(result => result.score > 0)
    .sort((a, b) => b.score - a.score)
}

function element(name, text, attributes = {}) {
  return Object.assign(document.createElement(name), { textContent: text, ...attributes })
}

function item({ page: [file, title, description], heading }) {
  const line = element("li", "")
  line.append(element("a", title, { href: file }))
  if (heading) line.append(" › ", element("a", heading[0], { href: file + heading[1] }))
  line.append(element("p", description))
  return line
}

function show(query) {
  const results = search(query).slice(0, SHOWN)
  const list = element("ul", "", { className: "search" })
  list.append(...results.map(item))
  const told = results.length ? `Pages for “${query}”, the best first.` : `No page has “${query}”.`
  document.getElementById("search-results").replaceChildren(element("p", told), list)
}

function startSearch() {
  const query = new URLSearchParams(location.search).get("q")
  for (const field of document.querySelectorAll("input[name=q]")) field.value = query
  if (query) show(query)
}

startSearch()
