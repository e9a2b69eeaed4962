/* Show the current page's place in the navigation, which can be longer than the screen. */
addEventListener("load", () => {
  const item = document.querySelector(".sidebar-tree .current-page");
  const box = document.querySelector(".sidebar-scroll");
  if (item && box) {
    box.scrollTop = item.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
  }
});
