// Labels each cell of a wide table of text with its column, for the style of narrow screens.
addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    const columns = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    if (columns.length < 2 || table.querySelector("td.text-right")) continue;
    table.classList.add("labelled");
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.cells].forEach((cell, index) => {
        cell.dataset.label = columns[index];
        cell.classList.toggle("blank", !cell.textContent.trim());
      });
    }
  }
  // Long names in the widest tables may break between their words.
  for (const name of document.querySelectorAll(":is(#spans > .table-wrapper, #conformance) code .pre")) {
    const words = name.textContent.split(/(?<=[._])/);
    name.replaceChildren(...words.flatMap((word) => [word, document.createElement("wbr")]));
  }
});
