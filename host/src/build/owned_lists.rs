//! Stops a leak in guests made by componentize-py 0.25.1.
//!
//! Whenever such a guest passes a `list<u8>` to the host, as a response or as
//! a chunk of one, its runtime copies the bytes into a fresh allocation and
//! never frees it: a guest that streams a gigabyte needs a gigabyte.
//!
//! The generated bindings in the component get each such copy from the
//! runtime's function `wit_dylib_pop_list`. They also know
//! `wit_dylib_dealloc_bytes`, which can be told to free an allocation at the
//! end of the call; lists that are lowered element by element use it so. This
//! module rewrites the bindings to call a wrapper that does both:
//!
//! ```text
//! length = wit_dylib_pop_list(context, type, &pointer)
//! if pointer and length: wit_dylib_dealloc_bytes(context, pointer, length, 1, defer = true)
//! ```
//!
//! The runtime returns a pointer only for lists of one-byte elements, so the
//! length is the size.

use anyhow::{Context as _, Result, bail};
use wasm_encoder::reencode::{Error, Reencode, utils};
use wasm_encoder::{BlockType, CodeSection, Function, FunctionSection, InstructionSink, MemArg, ValType};
use wasmparser::{CodeSectionReader, FunctionSectionReader, Parser, Payload, TypeRef};

/// The component with its bindings rewritten.
///
/// # Errors
///
/// If it does not have the one module that the pinned componentize-py makes.
pub fn free_lowered_lists(component: &[u8]) -> Result<Vec<u8>> {
    let mut rewritten = component.get(..8).context("the component is empty")?.to_vec();
    let mut found = 0;
    for section in crate::artifact::sections(component) {
        let section = section.context("the component is cut off")?;
        // Section 1 of a component is a core module.
        let bindings =
            if section.id == 1 { Bindings::find(&component[section.content.clone()])? } else { None };
        match bindings {
            Some(bindings) => {
                let module = bindings.rewrite(&component[section.content])?;
                crate::artifact::append_section(&mut rewritten, 1, &[&module]);
                found += 1;
            }
            None => rewritten.extend_from_slice(&component[section.start..section.content.end]),
        }
    }
    if found != 1 {
        bail!("expected one module with the bindings of componentize-py, found {found}");
    }
    Ok(rewritten)
}

/// What is to be known of the module that holds the generated bindings.
struct Bindings {
    /// Index of the imported `wit_dylib_pop_list`, and of its type.
    pop_list: (u32, u32),
    /// Index of the imported `wit_dylib_dealloc_bytes`.
    dealloc_bytes: u32,
    /// Number of all functions: the index of the wrapper.
    functions: u32,
}

impl Bindings {
    /// What is to be known of `module`, if it is the one.
    fn find(module: &[u8]) -> Result<Option<Bindings>> {
        let (mut pop_list, mut dealloc_bytes, mut functions) = (None, None, 0);
        for payload in Parser::new(0).parse_all(module) {
            match payload? {
                Payload::ImportSection(imports) => {
                    for import in imports.into_imports() {
                        let import = import?;
                        if let TypeRef::Func(type_index) = import.ty {
                            match import.name {
                                "wit_dylib_pop_list" => pop_list = Some((functions, type_index)),
                                "wit_dylib_dealloc_bytes" => dealloc_bytes = Some(functions),
                                _ => {}
                            }
                            functions += 1;
                        }
                    }
                }
                Payload::FunctionSection(section) => functions += section.count(),
                Payload::CodeSectionStart { .. } => break,
                _ => {}
            }
        }
        Ok(match (pop_list, dealloc_bytes) {
            (Some(pop_list), Some(dealloc_bytes)) => Some(Bindings { pop_list, dealloc_bytes, functions }),
            _ => None,
        })
    }

    /// `module` with each call of `wit_dylib_pop_list` going to the wrapper.
    fn rewrite(mut self, module: &[u8]) -> Result<Vec<u8>> {
        let mut rewritten = wasm_encoder::Module::new();
        self.parse_core_module(&mut rewritten, Parser::new(0), module)
            .context("failed to rewrite the bindings")?;
        Ok(rewritten.finish())
    }

    /// The wrapper. Its parameters are those of `wit_dylib_pop_list`: context,
    /// type, and the address where the pointer goes.
    fn wrapper(&self) -> Function {
        let (context, type_index, pointer_address, length, pointer) = (0, 1, 2, 3, 4);
        let mut function = Function::new([(2, ValType::I32)]);
        let mut code: InstructionSink<'_> = function.instructions();
        code.local_get(context)
            .local_get(type_index)
            .local_get(pointer_address)
            .call(self.pop_list.0)
            .local_set(length)
            .local_get(pointer_address)
            .i32_load(MemArg { offset: 0, align: 2, memory_index: 0 })
            .local_tee(pointer)
            .if_(BlockType::Empty)
            .local_get(length)
            .if_(BlockType::Empty)
            .local_get(context)
            .local_get(pointer)
            .local_get(length)
            .i32_const(1) // alignment
            .i32_const(1) // defer
            .call(self.dealloc_bytes)
            .end()
            .end()
            .local_get(length)
            .end();
        function
    }
}

impl Reencode for Bindings {
    type Error = std::convert::Infallible;

    fn function_index(&mut self, function: u32) -> Result<u32, Error<Self::Error>> {
        Ok(if function == self.pop_list.0 { self.functions } else { function })
    }

    fn parse_function_section(
        &mut self,
        functions: &mut FunctionSection,
        section: FunctionSectionReader<'_>,
    ) -> Result<(), Error<Self::Error>> {
        utils::parse_function_section(self, functions, section)?;
        functions.function(self.pop_list.1);
        Ok(())
    }

    fn parse_code_section(
        &mut self,
        code: &mut CodeSection,
        section: CodeSectionReader<'_>,
    ) -> Result<(), Error<Self::Error>> {
        utils::parse_code_section(self, code, section)?;
        code.function(&self.wrapper());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wasm_encoder::{
        CodeSection, EntityType, ExportKind, ExportSection, ImportSection, MemoryType, Module, TypeSection,
    };

    /// A module like the bindings: it exports `lower`, which calls what it
    /// imports as `wit_dylib_pop_list`.
    fn bindings() -> Vec<u8> {
        let mut types = TypeSection::new();
        types.ty().function([ValType::I32; 3], [ValType::I32]);
        types.ty().function([ValType::I32; 5], []);
        let mut imports = ImportSection::new();
        imports.import("env", "wit_dylib_dealloc_bytes", EntityType::Function(1));
        imports.import("env", "wit_dylib_pop_list", EntityType::Function(0));
        let memory =
            MemoryType { minimum: 1, maximum: None, memory64: false, shared: false, page_size_log2: None };
        imports.import("env", "memory", EntityType::Memory(memory));
        let mut functions = FunctionSection::new();
        functions.function(0);
        let mut exports = ExportSection::new();
        exports.export("lower", ExportKind::Func, 2);
        let mut lower = Function::new([]);
        lower.instructions().local_get(0).local_get(1).local_get(2).call(1).end();
        let mut code = CodeSection::new();
        code.function(&lower);
        let mut module = Module::new();
        module.section(&types).section(&imports).section(&functions).section(&exports).section(&code);
        module.finish()
    }

    fn component(modules: &[Vec<u8>]) -> Vec<u8> {
        let mut component = b"\0asm\x0d\0\x01\0".to_vec();
        for module in modules {
            crate::artifact::append_section(&mut component, 1, &[module]);
        }
        component
    }

    #[test]
    fn calls_go_to_the_wrapper_and_the_component_stays_valid() {
        let before = component(&[Module::new().finish(), bindings()]);
        let after = free_lowered_lists(&before).unwrap();
        wasmparser::Validator::new().validate_all(&after).unwrap();
        let mut calls = Vec::new();
        for payload in Parser::new(0).parse_all(&after) {
            if let Payload::CodeSectionEntry(body) = payload.unwrap() {
                let of_body = body.get_operators_reader().unwrap().into_iter().filter_map(|operator| {
                    match operator.unwrap() {
                        wasmparser::Operator::Call { function_index } => Some(function_index),
                        _ => None,
                    }
                });
                calls.push(of_body.collect::<Vec<_>>());
            }
        }
        // `lower` is function 2 and calls the wrapper, which is function 3.
        assert_eq!(calls, [vec![3], vec![1, 0]]);
    }

    #[test]
    fn any_other_component_is_refused() {
        assert!(free_lowered_lists(&component(&[Module::new().finish()])).is_err());
        assert!(free_lowered_lists(&component(&[bindings(), bindings()])).is_err());
    }
}
