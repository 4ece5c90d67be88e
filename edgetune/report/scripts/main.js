// Wiring: which file, which theme, how wide.
function showFile(index) {
  state.file = index;
  for (const part of document.querySelectorAll('[data-file]')) part.hidden = Number(part.dataset.file) !== index;
  for (const row of document.querySelectorAll('[data-row]')) row.classList.toggle('chosen', Number(row.dataset.row) === index);
  document.querySelector('.chooser')?.setAttribute('data-name', chosenFile().name);
  heatMap();
  redraw(true);
}

// Where the page may not store anything (some browsers treat files so), the choice holds until it is closed.
const THEME = 'edgetune-theme';
function storedTheme() {
  try { return localStorage.getItem(THEME); } catch { return null; }
}
function storeTheme(theme) {
  try { localStorage.setItem(THEME, theme); } catch { /* held by the page alone */ }
}

function themeButton() {
  const button = byId('theme');
  const system = matchMedia('(prefers-color-scheme: dark)');
  const shown = () => document.documentElement.dataset.theme ?? (system.matches ? 'dark' : 'light');
  const other = () => (shown() === 'dark' ? 'light' : 'dark');
  const say = () => {
    button.textContent = other() === 'dark' ? 'Dark' : 'Light';
    button.setAttribute('aria-label', `Switch to ${other()} colours`);
  };
  const stored = storedTheme();
  if (stored === 'dark' || stored === 'light') document.documentElement.dataset.theme = stored;
  button.hidden = false;
  button.addEventListener('click', () => {
    document.documentElement.dataset.theme = other();
    storeTheme(shown());
    say();
  });
  system.addEventListener('change', say);
  say();
}

function forPaper() {
  const opened = [];
  addEventListener('beforeprint', () => {
    for (const details of document.querySelectorAll('details:not([open])')) {
      details.open = true;
      opened.push(details);
    }
    state.paper = true;
    redraw(true);
  });
  addEventListener('afterprint', () => {
    for (const details of opened.splice(0)) details.open = false;
    state.paper = false;
    redraw(true);
  });
}

themeButton();
forPaper();
ladderChoice();
heatLegend();
byId('survival-chart').before(survivalLegend());
chart('ladder-chart', ladderChart);
chart('sizes-chart', sizesChart);
chart('spread-chart', spreadChart);
chart('survival-chart', survivalChart);
chart('located-chart', locatedChart);
chart('loss-chart', lossChart);
chart('rate-chart', rateChart);
chart('norm-chart', normChart);
DATA.curves.figures.forEach((figure, index) => chart(`figure-chart-${index}`, (width) => figureChart(width, figure)));
byId('file')?.addEventListener('change', (event) => showFile(Number(event.target.value)));
showFile(state.file);
new ResizeObserver(() => redraw(false)).observe(document.querySelector('main'));
