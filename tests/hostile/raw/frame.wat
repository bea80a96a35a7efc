;; What every raw guest stands in: all that it may import, and the exports of
;; our world. The tests put a guest in the place that is marked, which defines
;;
;; - a core module `$memory` with the exports `memory`, `realloc` and `next`, or
;;   the one of `memory.wat`,
;; - a core module `$guest` with the exports `handle` and `run`, which may
;;   import what is in `memory` and `host` below.
(component
  (import "wsgi-wasm:gateway/request-body@0.1.0" (instance $request-body
    (type $e (enum "client-gone" "too-large" "unavailable"))
    (export "read-error" (type $error (eq $e)))
    (export "read" (func (param "max" u32) (result (result (list u8) (error $error)))))))
  (import "wsgi-wasm:gateway/response@0.1.0" (instance $response
    (type $e (enum "client-gone" "refused"))
    (export "write-error" (type $error (eq $e)))
    (export "start" (func (param "head" (list u8)) (result (result (error $error)))))
    (export "write" (func (param "chunk" (list u8)) (result (result (error $error)))))
    (export "finish" (func (result (result (error $error)))))
    (export "send-whole" (func (param "response" (list u8)) (result (result (error $error)))))
    (export "send-file" (func (param "head" (list u8)) (param "path" string) (param "offset" u64)
      (param "length" u64) (result (result bool (error $error)))))
    (export "early-hints" (func (param "fields" (list u8)) (result (result (error $error)))))))
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))
    (export "poll" (func (param "in" (list (borrow $pollable))) (result (list u32))))))
  (alias export $poll "pollable" (type $pollable))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (alias outer 1 $pollable (type $p))
    (export "pollable" (type $pollable (eq $p)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $pollable))))))
  (import "wasi:random/random@0.2.0" (instance $random
    (export "get-random-bytes" (func (param "len" u64) (result (list u8))))))
  (import "wasi:io/error@0.2.0" (instance $io-error
    (export "error" (type (sub resource)))))
  (alias export $io-error "error" (type $error))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (alias outer 1 $error (type $e))
    (export "error" (type $error (eq $e)))
    (type $f (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $failure (eq $f)))
    (export "output-stream" (type $output (sub resource)))
    (export "[method]output-stream.write" (func (param "self" (borrow $output))
      (param "contents" (list u8)) (result (result (error $failure)))))
    (export "[method]output-stream.write-zeroes" (func (param "self" (borrow $output))
      (param "len" u64) (result (result (error $failure)))))))
  (alias export $streams "output-stream" (type $output))
  (import "wasi:cli/stderr@0.2.0" (instance $stderr
    (alias outer 1 $output (type $o))
    (export "output-stream" (type $output (eq $o)))
    (export "get-stderr" (func (result (own $output))))))
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-environment" (func (result (list (tuple string string)))))))
  (import "wasi:cli/exit@0.2.0" (instance $exit
    (export "exit" (func (param "status" (result))))))

  ;; GUEST

  (core instance $m (instantiate $memory))
  (alias core export $m "memory" (core memory $mem))
  (alias core export $m "realloc" (core func $realloc))

  (core func $read (canon lower (func $request-body "read") (memory $mem) (realloc $realloc)))
  (core func $start (canon lower (func $response "start") (memory $mem)))
  (core func $write (canon lower (func $response "write") (memory $mem)))
  (core func $finish (canon lower (func $response "finish") (memory $mem)))
  (core func $send-whole (canon lower (func $response "send-whole") (memory $mem)))
  (core func $send-file (canon lower (func $response "send-file") (memory $mem)))
  (core func $early-hints (canon lower (func $response "early-hints") (memory $mem)))
  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core func $poll-list (canon lower (func $poll "poll") (memory $mem) (realloc $realloc)))
  (core func $subscribe (canon lower (func $clock "subscribe-duration")))
  (core func $random-bytes (canon lower (func $random "get-random-bytes") (memory $mem) (realloc $realloc)))
  (core func $stderr-handle (canon lower (func $stderr "get-stderr")))
  (core func $log (canon lower (func $streams "[method]output-stream.write") (memory $mem)))
  (core func $log-zeroes (canon lower (func $streams "[method]output-stream.write-zeroes") (memory $mem)))
  (core func $variables (canon lower (func $environment "get-environment") (memory $mem) (realloc $realloc)))
  (core func $exit-now (canon lower (func $exit "exit")))

  (core instance $g (instantiate $guest
    (with "memory" (instance $m))
    (with "host" (instance
      (export "read" (func $read))
      (export "start" (func $start))
      (export "write" (func $write))
      (export "finish" (func $finish))
      (export "send-whole" (func $send-whole))
      (export "send-file" (func $send-file))
      (export "early-hints" (func $early-hints))
      (export "block" (func $block))
      (export "poll" (func $poll-list))
      (export "subscribe" (func $subscribe))
      (export "random" (func $random-bytes))
      (export "stderr" (func $stderr-handle))
      (export "log" (func $log))
      (export "log-zeroes" (func $log-zeroes))
      (export "environment" (func $variables))
      (export "exit" (func $exit-now))))))

  (func $handle (param "environ" (list u8)) (param "body" (list u8)) (result (list u8))
    (canon lift (core func $g "handle") (memory $mem) (realloc $realloc)))
  (func $run (param "arguments" (list string)) (result u8)
    (canon lift (core func $g "run") (memory $mem) (realloc $realloc)))
  (instance (export "wsgi-wasm:gateway/handler@0.1.0") (export "handle" (func $handle)))
  (instance (export "wsgi-wasm:gateway/command@0.1.0") (export "run" (func $run)))
)
