"""The page at `/`: one form to try the service by hand, in plain HTML without anything from elsewhere."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>recsys</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem; }
  label { display: inline-block; margin-right: 1rem; }
  input { font: inherit; padding: .2rem .4rem; }
  input[type=number] { width: 5rem; }
  button { font: inherit; padding: .2rem .8rem; }
  table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
  th, td { text-align: left; padding: .25rem .5rem; border-bottom: 1px solid #8884; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; }
  #said { min-height: 1.5em; }
  a { margin-right: 1rem; }
</style>
</head>
<body>
<h1>Recommendations</h1>
<form id="ask">
  <label>User <input id="user" list="users" required></label><datalist id="users"></datalist>
  <label>Items <input id="k" type="number" min="1" max="100" value="10"></label>
  <button>Recommend</button>
</form>
<p id="said" role="status"></p>
<table id="answer" hidden><thead><tr><th>#</th><th>Item</th><th>Score</th><th>Proposed by</th></tr></thead>
<tbody></tbody></table>
<p><a href="/docs">API</a><a href="/openapi.json">OpenAPI</a><a href="/v1/models">Models</a><a
href="/metrics">Metrics</a>
</p>
<script>
const at = id => document.getElementById(id);
fetch("/v1/users?limit=20").then(r => r.json()).then(found => {
  for (const user of found.users) at("users").append(new Option(user));
  if (found.users.length) at("user").value = found.users[0];
});
at("ask").addEventListener("submit", async event => {
  event.preventDefault();
  const began = performance.now();
  const response = await fetch("/v1/recommend", {
    method: "POST", headers: {"Content-Type": "application/json"},
    body: JSON.stringify({user_id: at("user").value, k: Number(at("k").value)}),
  });
  const answer = await response.json();
  const rows = at("answer").tBodies[0];
  rows.replaceChildren();
  at("answer").hidden = !response.ok;
  if (!response.ok) { at("said").textContent = answer.detail; return; }
  at("said").textContent = `${answer.history_events} events known` +
    (answer.user_known ? "" : ", so the popular items") +
    ` - ${(performance.now() - began).toFixed(1)} ms - bundle ${answer.model_version}`;
  answer.items.forEach((item, rank) => {
    const row = rows.insertRow();
    for (const text of [rank + 1, item.name || item.item_id, item.score.toFixed(3), item.sources.join(", ")])
      row.insertCell().textContent = text;
    row.cells[2].className = "number";
  });
});
</script>
</body>
</html>
"""
