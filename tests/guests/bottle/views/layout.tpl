<title>{{title or "untitled"}}</title>
<main>{{!base}}</main>
