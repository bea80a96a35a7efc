;; Has more memory from the start than it may have.
(core module $memory
  (memory (export "memory") 8192)
  (global (export "next") (mut i32) (i32.const 0))
  (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0)))
(core module $guest
  (func (export "run") (param i32 i32) (result i32) (i32.const 0))
  (func (export "handle") (param i32 i32 i32 i32) (result i32) (i32.const 0)))
