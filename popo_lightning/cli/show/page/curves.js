// The list of charts.

function curve(name, options = {}) {
  return shownRuns().map((run) => ({
    run,
    name: options.label ? `${run.name}, ${options.label}` : run.name,
    smooth: true,
    ...options,
    ...column(run, name),
  }));
}

const chart = (title, about, unit, name, options = {}) =>
  lineChart({ title, about, unit, zero: true, ...options, series: () => curve(name) });

function learningCharts() {
  const shares = { solid: 'effective, of fresh groups', dashed: 'replayed, of groups trained on' };
  return el(
    'div',
    { class: 'charts' },
    chart('Reward', 'Mean score of fresh responses.', 'score', 'reward/score'),
    ...evaluationCharts(),
    lineChart({
      title: 'Effective and replayed',
      about: 'POPO replays stored groups in place of ineffective ones.',
      unit: 'share',
      zero: true,
      top: 1,
      strokes: shares,
      series: () => [
        ...curve('rollout/effective_share', { label: 'effective' }),
        ...curve('replay/share', { label: 'replayed', dash: 'dashed' }),
      ],
    }),
    chart('Entropy', 'Of the next token; an early collapse ends exploration.', 'nats a token', 'policy/entropy'),
    chart('Response length', 'Mean of fresh responses.', 'tokens', 'rollout/response_tokens', { zero: false }),
    lineChart({
      title: 'Clipped tokens',
      about: 'Tokens at a bound of the trust region.',
      unit: 'share',
      zero: true,
      strokes: { solid: 'fresh', dashed: 'replayed' },
      series: () => [
        ...curve('policy/clip_frac_fresh', { label: 'fresh' }),
        ...curve('policy/clip_frac_replayed', { label: 'replayed', dash: 'dashed' }),
      ],
    }),
    anyChart(),
  );
}

const KINDS = [
  [/^greedy$/, 'Greedy accuracy', 'The most likely response to each held-out problem.'],
  [/^avg/, 'avg@k', 'Mean of k samples to each held-out problem.'],
  [/^pass/, 'pass@k', 'Chance that one of k samples is right.'],
];

function evaluationCharts() {
  const labels = new Map();
  for (const name of namesOf(/^eval\//)) {
    const [, benchmark, label] = name.match(/^eval\/(.*)\/([^/]*)$/) || [];
    if (label && KINDS.some(([pattern]) => pattern.test(label)))
      labels.set(label, [...(labels.get(label) || []), benchmark]);
  }
  const order = ([label]) =>
    KINDS.findIndex(([pattern]) => pattern.test(label)) + Number(label.split('_at_')[1] || 0) / 1e6;
  return [...labels]
    .sort((a, b) => order(a) - order(b))
    .map(([label, benchmarks]) => {
      const about = KINDS.find(([pattern]) => pattern.test(label));
      let chosen = benchmarks.includes('mean') ? 'mean' : benchmarks[0];
      const control =
        benchmarks.length > 1
          ? choice(
              '',
              benchmarks.map((each) => [each, each]),
              chosen,
              (value) => ((chosen = value), redraw()),
            )
          : null;
      return lineChart({
        title: () =>
          (label === 'greedy' ? about[1] : label.replace('_at_', '@')) + (benchmarks.length > 1 ? '' : ` on ${chosen}`),
        about: about[2],
        unit: 'accuracy',
        zero: true,
        control,
        series: () => curve(`eval/${chosen}/${label}`, { smooth: false, dots: true }),
      });
    });
}

function anyChart() {
  const names = namesOf(/\//);
  let chosen = names.includes('train/grad_norm') ? 'train/grad_norm' : names[0];
  const control = choice(
    '',
    names.map((name) => [name, name]),
    chosen,
    (value) => ((chosen = value), redraw()),
  );
  return lineChart({
    title: 'Any metric',
    about: 'Every column of metrics.csv.',
    unit: '',
    control,
    series: () => curve(chosen),
  });
}

function weightCharts() {
  return el(
    'div',
    { class: 'charts' },
    lineChart({
      title: 'Weights of replayed tokens',
      about: 'prox / behave before any cap.',
      unit: 'weight, log',
      log: true,
      strokes: { solid: 'median', dashed: '99th percentile', band: '5th to 95th percentile' },
      series: () =>
        shownRuns().flatMap((run) => {
          const [low, high] = [column(run, 'weight/replayed_p05'), column(run, 'weight/replayed_p95')];
          const middle = {
            run,
            name: `${run.name}, median`,
            low: low.y,
            high: high.y,
            ...column(run, 'weight/replayed_p50'),
          };
          return [middle, { run, name: `${run.name}, 99th`, dash: 'dashed', ...column(run, 'weight/replayed_p99') }];
        }),
    }),
    lineChart({
      title: 'Effective sample size',
      about: 'Share of replayed tokens that the weighted ones are worth.',
      unit: 'share',
      top: 1,
      bottom: 0.9,
      series: () => curve('weight/replayed_ess'),
    }),
    lineChart({
      title: 'Effective sample size by age',
      about: 'Mean over the run; the lower, the less an age teaches.',
      unit: 'share',
      axis: 'age in policy versions',
      top: 1,
      bottom: 0.9,
      whole: true,
      series: () => shownRuns().map((run) => ({ run, name: run.name, dots: true, ...byAge(run, 'ess') })),
    }),
    ageChart(),
    lineChart({
      title: 'Age of replayed groups',
      about: 'Mean, and up to the oldest.',
      unit: 'policy versions',
      zero: true,
      strokes: { solid: 'mean', dashed: 'oldest' },
      series: () => [
        ...curve('replay/age_mean', { label: 'mean' }),
        ...curve('replay/age_max', { label: 'oldest', dash: 'dashed', smooth: false }),
      ],
    }),
    lineChart({
      title: 'Engine against policy',
      about: 'Log-probs of fresh tokens; only rounding should differ.',
      unit: 'nats a token',
      zero: true,
      series: () => curve('engine/logp_gap_mean'),
    }),
  );
}

function byAge(run, kind) {
  const found = Object.keys(run.columns).map((name) => [
    Number((name.match(new RegExp(`^weight/${kind}_age_(\\d+)$`)) || [])[1]),
    name,
  ]);
  const ages = found.filter(([age]) => !Number.isNaN(age)).sort((a, b) => a[0] - b[0]);
  return { x: ages.map(([age]) => age), y: ages.map(([, name]) => meanOf(run, name)) };
}

// Shares of all tokens if the run has counted them by age, otherwise of the responses in samples.jsonl.
function ageShares(run) {
  const steps = run.columns.step.length - (run.columns['train/tokens'] || []).filter((value) => value === null).length;
  const counted = Object.entries(run.columns)
    .map(([name, values]) => [name.match(/^weight\/share_age_(\d+)$/)?.[1], values])
    .filter(([age]) => age !== undefined);
  if (counted.length)
    return new Map(
      counted.map(([age, values]) => [
        Number(age),
        values.reduce((sum, value) => sum + (value ?? 0), 0) / Math.max(1, steps),
      ]),
    );
  const ages = run.groups
    .filter((group) => !group.evaluated)
    .flatMap((group) => group.responses.map((response) => response.age))
    .filter((age) => age !== undefined);
  const found = new Map();
  for (const age of ages) found.set(age, (found.get(age) || 0) + 1 / ages.length);
  return found;
}

function ageChart() {
  const categories = () => {
    const ages = shownRuns().flatMap((run) => [...ageShares(run).keys()]);
    return ages.length ? Array.from({ length: Math.max(...ages) + 1 }, (_, age) => age) : [];
  };
  return barChart({
    title: 'Tokens trained on by age',
    about: 'Age 0 is fresh.',
    unit: 'share',
    axis: 'age in policy versions',
    form: percent,
    categories,
    series: () =>
      shownRuns().map((run) => ({
        run,
        name: run.name,
        values: categories().map((age) => ageShares(run).get(age) || 0),
      })),
  });
}

const PHASES = ['generate', 'verify', 'compose', 'rescore', 'prox', 'train', 'sync', 'wait', 'other'];

function timeCharts() {
  const parts = (run) =>
    Object.fromEntries(PHASES.map((name) => [name, meanOf(run, `time/${name}`)]).filter(([, value]) => value > 0));
  return el(
    'div',
    { class: 'charts' },
    stackChart({
      title: 'Seconds by phase',
      about: 'Mean of an iteration, evaluations apart.',
      unit: 's',
      parts: PHASES,
      rows: () =>
        shownRuns()
          .map((run) => ({ run, parts: parts(run) }))
          .filter((row) => Object.keys(row.parts).length),
    }),
    chart('Seconds of an iteration', 'Evaluations and the start of the engine apart.', 's', 'time/iteration'),
    lineChart({
      title: 'Generating and training',
      about: 'Seconds of an iteration that went into each.',
      unit: 's',
      zero: true,
      strokes: { solid: 'generate', dashed: 'train' },
      series: () => [
        ...curve('time/generate', { label: 'generate' }),
        ...curve('time/train', { label: 'train', dash: 'dashed' }),
      ],
    }),
  );
}
