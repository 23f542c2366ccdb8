// From a file system a page may not read other pages: the search then lists titles only.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

addEventListener("DOMContentLoaded", () => {
  // The theme's name for this button leaves out the keys that it shows.
  for (const button of document.querySelectorAll(".search-button-field")) {
    button.removeAttribute("aria-label");
  }
  // What is wider than the page is scrolled with the keys, too.
  const wide = ".math-block, .pst-scrollable-table-container, .bd-article pre";
  for (const element of document.querySelectorAll(wide)) {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
  }
});
