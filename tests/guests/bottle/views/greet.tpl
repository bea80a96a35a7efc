% rebase("layout", title="Greetings")
% for number in range(times):
<p>{{number + 1}}: Hello, {{name}}!</p>
% end
