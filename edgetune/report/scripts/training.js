// Curves of the training log.
function curve(width, series, height, log, within) {
  const all = series.flatMap((each) => each.points);
  if (!all.length) return null;
  const positive = all.map((point) => point[1]).filter((value) => value > 0);
  const y = log && positive.length === all.length && Math.max(...positive) > 20 * Math.min(...positive)
    ? logarithmic(positive, 1.3)
    : { type: 'linear', domain: within ?? [0, 1.05 * Math.max(...all.map((point) => point[1]))], ticks: 4, tickFormat: plain };
  return Plot.plot({
    width,
    height,
    marginLeft: 54,
    marginRight: series.some((each) => each.name) ? 84 : 16,
    marginTop: 12,
    marginBottom: 40,
    x: { label: null },
    y: { ...y, label: null, grid: true, nice: y.type === 'linear' },
    marks: [
      Plot.axisX({ tickSize: 0, ticks: Math.max(3, Math.floor(width / 120)), label: 'Step', labelArrow: 'none', labelAnchor: 'left', labelOffset: 34 }),
      Plot.axisY({ tickSize: 0, ticks: y.ticks, tickFormat: y.tickFormat }),
      ...series.flatMap((each) => seriesMarks(each)),
    ],
  });
}

function seriesMarks({ points, color, dash, dots, name, dy }) {
  const last = points.slice(-1);
  return [
    Plot.line(points, { x: '0', y: '1', stroke: color, strokeWidth: 2, strokeDasharray: dash }),
    ...(dots ? [Plot.dot(points, { x: '0', y: '1', r: 3.5, fill: color })] : []),
    ...(name ? [Plot.text(last, { x: '0', y: '1', text: () => name, dx: 9, dy, textAnchor: 'start', fill: color, fontSize: 12, fontWeight: 600 })] : []),
  ];
}

function lossChart(width) {
  const { loss, held_out: heldOut } = DATA.curves;
  const lossIsAbove = (loss.at(-1)?.[1] ?? 0) > (heldOut.at(-1)?.[1] ?? 0);
  const series = [
    { points: loss, color: 'var(--soft)', name: 'training', dy: lossIsAbove ? -8 : 8 },
    { points: heldOut, color: 'var(--accent)', dots: true, name: 'held-out', dy: lossIsAbove ? 8 : -8 },
  ];
  return curve(width, series.filter((each) => each.points.length), 270, true);
}
const rateChart = (width) => curve(width, [{ points: DATA.curves.learning_rate, color: 'var(--soft)' }], 190, false);
const normChart = (width) => curve(width, [{ points: DATA.curves.grad_norm, color: 'var(--soft)' }], 190, true);

// A figure of the objective: its values may be negative, and their range may be far from 0.
function figureChart(width, { training, held_out: heldOut }) {
  const values = [...training, ...heldOut].map((point) => point[1]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = 0.08 * (high - low) || 0.1 * Math.abs(high) || 1;
  const above = (training.at(-1)?.[1] ?? 0) > (heldOut.at(-1)?.[1] ?? 0);
  const series = [
    { points: training, color: 'var(--soft)', name: 'training', dy: above ? -8 : 8 },
    { points: heldOut, color: 'var(--accent)', dots: true, name: 'held-out', dy: above ? 8 : -8 },
  ];
  return curve(width, series.filter((each) => each.points.length), 190, false, [low - room, high + room]);
}
