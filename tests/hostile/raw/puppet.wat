;; Does what the body of the request tells it, call by call, with the pointers
;; and lengths that it tells: so the tests say in one place what an attacker
;; passes, down to the last bit.
;;
;; The body starts with orders of 48 bytes, all numbers little-endian:
;;
;;   0 operation, see the table below    16 d          32 e (64 bits)
;;   4 a: address, from the body's start 20 times      40 f (64 bits)
;;   8 b: length                         24 absolute: a and c are addresses as they are
;;  12 c: address, as a
(core module $guest
  (import "memory" "memory" (memory 1))
  (import "memory" "next" (global $next (mut i32)))
  (import "host" "read" (func $read (param i32 i32)))
  (import "host" "start" (func $start (param i32 i32 i32)))
  (import "host" "write" (func $write (param i32 i32 i32)))
  (import "host" "finish" (func $finish (param i32)))
  (import "host" "send-whole" (func $send-whole (param i32 i32 i32)))
  (import "host" "send-file" (func $send-file (param i32 i32 i32 i32 i64 i64 i32)))
  (import "host" "early-hints" (func $early-hints (param i32 i32 i32)))
  (import "host" "block" (func $block (param i32)))
  (import "host" "poll" (func $poll (param i32 i32 i32)))
  (import "host" "subscribe" (func $subscribe (param i64) (result i32)))
  (import "host" "random" (func $random (param i64 i32)))
  (import "host" "stderr" (func $stderr (result i32)))
  (import "host" "log" (func $log (param i32 i32 i32 i32)))
  (import "host" "log-zeroes" (func $log-zeroes (param i32 i64 i32)))
  (import "host" "exit" (func $exit (param i32)))
  (table $table 10 funcref)
  (global $pollable (mut i32) (i32.const 0))
  (global $log-handle (mut i32) (i32.const 0))
  ;; What came of the last call: the first word of its result.
  (global $outcome (mut i32) (i32.const 0))

  (func $recurse (param $depth i64) (result i64)
    (i64.add (call $recurse (i64.add (local.get $depth) (i64.const 1))) (local.get $depth)))

  (func (export "run") (param i32 i32) (result i32) (i32.const 0))

  (func (export "handle") (param $environ i32) (param $environ-length i32) (param $body i32) (param $length i32)
    (result i32)
    (local $order i32) (local $operation i32) (local $times i32) (local $base i32) (local $kept i32)
    (local $a i32) (local $b i32) (local $c i32) (local $d i32) (local $e i64) (local $f i64)
    (local.set $order (local.get $body))
    (local.set $kept (global.get $next))
    (loop $orders
      (local.set $operation (i32.load offset=0 (local.get $order)))
      (local.set $base (if (result i32) (i32.load offset=24 (local.get $order))
        (then (i32.const 0)) (else (local.get $body))))
      (local.set $a (i32.add (local.get $base) (i32.load offset=4 (local.get $order))))
      (local.set $b (i32.load offset=8 (local.get $order)))
      (local.set $c (i32.add (local.get $base) (i32.load offset=12 (local.get $order))))
      (local.set $d (i32.load offset=16 (local.get $order)))
      (local.set $times (i32.load offset=20 (local.get $order)))
      (local.set $e (i64.load offset=32 (local.get $order)))
      (local.set $f (i64.load offset=40 (local.get $order)))
      (loop $again
        ;; What the host lists for us is not kept.
        (global.set $next (local.get $kept))
        (block $done
          (block $whole (block $pointer (block $fill (block $grow-table (block $grow-memory (block $recursion (block $spin (block $trap
          (block $leave (block $zeroes (block $output (block $wait (block $block-on (block $clock
          (block $bytes (block $read-body (block $file (block $hints (block $end (block $chunk (block $head
          (block $answer
            (br_table $answer $head $chunk $end $hints $file $read-body $bytes $clock $block-on $wait $output
              $zeroes $leave $trap $spin $recursion $grow-memory $grow-table $fill $pointer $whole
              $trap
              (local.get $operation)))
          ;; 0: returns b bytes at a, and tells nothing of what became of the rest.
            (i32.store offset=8 (i32.const 0) (local.get $a))
            (i32.store offset=12 (i32.const 0) (local.get $b))
            (global.set $next (i32.const 4096))
            (return (i32.const 8)))
          ;; 1: response.start
            (call $start (local.get $a) (local.get $b) (i32.const 16)) (br $done))
          ;; 2: response.write
            (call $write (local.get $a) (local.get $b) (i32.const 16)) (br $done))
          ;; 3: response.finish
            (call $finish (i32.const 16)) (br $done))
          ;; 4: response.early-hints
            (call $early-hints (local.get $a) (local.get $b) (i32.const 16)) (br $done))
          ;; 5: response.send-file, with the head at a and the path at c
            (call $send-file (local.get $a) (local.get $b) (local.get $c) (local.get $d) (local.get $e)
              (local.get $f) (i32.const 16)) (br $done))
          ;; 6: request-body.read of b bytes
            (call $read (local.get $b) (i32.const 16)) (br $done))
          ;; 7: get-random-bytes of e bytes
            (call $random (local.get $e) (i32.const 16)) (br $done))
          ;; 8: a new pollable, ready after e nanoseconds
            (global.set $pollable (call $subscribe (local.get $e))) (br $done))
          ;; 9: waits for the last one
            (call $block (global.get $pollable)) (br $done))
          ;; 10: polls b times the last one, listed from a on
            (local.set $d (i32.const 0))
            (loop $list
              (i32.store (i32.add (local.get $a) (i32.shl (local.get $d) (i32.const 2))) (global.get $pollable))
              (local.set $d (i32.add (local.get $d) (i32.const 1)))
              (br_if $list (i32.lt_u (local.get $d) (local.get $b))))
            (call $poll (local.get $a) (local.get $b) (i32.const 16)) (br $done))
          ;; 11: writes b bytes at a to the log
            (if (i32.eqz (global.get $log-handle)) (then (global.set $log-handle (call $stderr))))
            (call $log (global.get $log-handle) (local.get $a) (local.get $b) (i32.const 16)) (br $done))
          ;; 12: writes e zeroes to the log
            (if (i32.eqz (global.get $log-handle)) (then (global.set $log-handle (call $stderr))))
            (call $log-zeroes (global.get $log-handle) (local.get $e) (i32.const 16)) (br $done))
          ;; 13: exits
            (call $exit (local.get $b)) (br $done))
          ;; 14: traps
            (unreachable))
          ;; 15: computes for ever
            (loop $for-ever (br $for-ever)))
          ;; 16: calls itself for ever
            (drop (call $recurse (i64.const 0))) (br $done))
          ;; 17: grows the memory by b pages
            (drop (memory.grow (local.get $b))) (br $done))
          ;; 18: grows a table by b elements
            (drop (table.grow $table (ref.null func) (local.get $b))) (br $done))
          ;; 19: sets b bytes at a to d
            (memory.fill (local.get $a) (local.get $d) (local.get $b)) (br $done))
          ;; 20: returns the pointer a itself, which need not point to a list
            (return (local.get $a)))
          ;; 21: response.send-whole
            (call $send-whole (local.get $a) (local.get $b) (i32.const 16)))
        (local.set $times (i32.sub (local.get $times) (i32.const 1)))
        (br_if $again (i32.gt_s (local.get $times) (i32.const 0))))
      (local.set $order (i32.add (local.get $order) (i32.const 48)))
      (br $orders))
    (unreachable)))
