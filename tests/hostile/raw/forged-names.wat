;; Traps in a function whose name would be a line of the host's log, and would
;; colour the operator's terminal.
(core module $guest
  (func $trap (@name "f\n2026-01-01T00:00:00Z ERROR forged: all is lost \1b[31m") (unreachable))
  (func (export "run") (param i32 i32) (result i32) (i32.const 0))
  (func (export "handle") (param i32 i32 i32 i32) (result i32) (call $trap) (i32.const 0)))
