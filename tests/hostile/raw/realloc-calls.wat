;; Calls the host from within `realloc`, where the host stands in the middle
;; of a call to the guest: through a table, since the host's functions come
;; after the memory.
(core module $memory
  (type $write (func (param i32 i32 i32)))
  (memory (export "memory") 1)
  (table (export "table") 1 funcref)
  (global (export "next") (mut i32) (i32.const 0))
  (func (export "realloc") (param i32 i32 i32 i32) (result i32)
    (call_indirect (type $write) (i32.const 0) (i32.const 1) (i32.const 64) (i32.const 0))
    (i32.const 1024)))
(core module $guest
  (import "memory" "table" (table 1 funcref))
  (import "host" "write" (func $write (param i32 i32 i32)))
  (elem (i32.const 0) func $write)
  (func (export "run") (param i32 i32) (result i32) (i32.const 0))
  (func (export "handle") (param i32 i32 i32 i32) (result i32) (i32.const 0)))
