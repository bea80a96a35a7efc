//! A component with all that the library knows how to handle: a module that
//! holds memory, globals and data; a shared library; a shim and its filler.

use wasm_encoder::{
    Alias, CanonicalFunctionSection, CanonicalOption, CodeSection, Component, ComponentAliasSection,
    ComponentExportKind, ComponentExportSection, ComponentImportSection, ComponentTypeRef,
    ComponentTypeSection, ComponentValType, ConstExpr, CustomSection, DataSection, ElementSection, Elements,
    EntityType, ExportKind, ExportSection, Function, FunctionSection, GlobalSection, GlobalType,
    ImportSection, InstanceSection, MemArg, MemorySection, MemoryType, Module, ModuleArg, ModuleSection,
    NameMap, NameSection, PrimitiveValType, RefType, StartSection, TableSection, TableType, TypeSection,
    ValType,
};

/// What one app differs in from another, and what may be wrong with it.
#[derive(Clone, Copy)]
pub struct Sample {
    /// What is in memory at the address 1040.
    pub data: i32,
    /// Where the stack starts.
    pub stack: i32,
    /// The start value of a counter.
    pub counter: i32,
    /// Pages of memory.
    pub pages: u64,
    /// The library says that it is one.
    pub dylink: bool,
    /// The library has a start function.
    pub start: bool,
    /// The module with the memory is instantiated a second time.
    pub twice: bool,
    /// The library is instantiated a second time.
    pub library_twice: bool,
    /// A function that the library gets is not what its slot in the shim says.
    pub forged_shim: bool,
    /// There is no module that fills the shim.
    pub no_filler: bool,
    /// The shim's slot is filled with the shim's own function.
    pub circle: bool,
    /// The component exports what no module does.
    pub missing_export: bool,
    /// The library has a memory of its own.
    pub second_memory: bool,
    /// The component imports a core module.
    pub imports_module: bool,
}

impl Sample {
    /// One app.
    pub fn new() -> Sample {
        Sample {
            data: 500_000,
            stack: 65_536,
            counter: 7,
            pages: 2,
            dylink: true,
            start: false,
            twice: false,
            library_twice: false,
            forged_shim: false,
            no_filler: false,
            circle: false,
            missing_export: false,
            second_memory: false,
            imports_module: false,
        }
    }

    /// The component. It imports `double` and `name`, and exports `run`.
    pub fn component(&self) -> Vec<u8> {
        let number = ComponentValType::Primitive(PrimitiveValType::U32);
        let text = ComponentValType::Primitive(PrimitiveValType::String);
        let mut types = ComponentTypeSection::new();
        types.function().params([("x", number)]).result(Some(number));
        types.function().params([] as [(&str, ComponentValType); 0]).result(Some(text));
        let mut imports = ComponentImportSection::new();
        imports.import("double", ComponentTypeRef::Func(0)).import("name", ComponentTypeRef::Func(1));
        let mut component = Component::new();
        component.section(&types).section(&imports);
        if self.imports_module {
            let mut core_types = wasm_encoder::CoreTypeSection::new();
            core_types.ty().module(&wasm_encoder::ModuleType::new());
            let mut imports = ComponentImportSection::new();
            imports.import("code", ComponentTypeRef::Module(0));
            component.section(&core_types).section(&imports);
        }
        for module in [self.holder(), self.library(), self.shim(), filler()] {
            component.section(&ModuleSection(&module));
        }
        let (holder, library, shim, filler) = (0, 1, 2, 3);
        instantiate(&mut component, shim, &[]); // instance 0
        let mut lower = CanonicalFunctionSection::new();
        lower.lower(0, []); // function 0: double
        component.section(&lower);
        export_items(&mut component, &[("double", ExportKind::Func, 0)]); // instance 1
        instantiate(&mut component, holder, &[("host", 1)]); // instance 2
        for (kind, name) in [
            (ExportKind::Memory, "memory"),
            (ExportKind::Table, "table"),
            (ExportKind::Global, "__stack_pointer"),
            (ExportKind::Global, "memory_base"),
            (ExportKind::Global, "table_base"),
            (ExportKind::Global, "got:x"),
            (ExportKind::Func, "count"), // function 1
        ] {
            alias(&mut component, 2, kind, name);
        }
        alias(&mut component, 0, ExportKind::Func, "0"); // function 2: name, through the shim
        export_items(
            &mut component,
            &[
                ("memory", ExportKind::Memory, 0),
                ("table", ExportKind::Table, 0),
                ("__stack_pointer", ExportKind::Global, 0),
                ("__memory_base", ExportKind::Global, 1),
                ("__table_base", ExportKind::Global, 2),
                ("x", ExportKind::Global, 3),
                ("count", ExportKind::Func, 1),
                ("double", ExportKind::Func, 0),
                ("name", ExportKind::Func, 2),
            ],
        ); // instance 3
        instantiate(&mut component, library, &[("env", 3)]); // instance 4
        alias(&mut component, 4, ExportKind::Func, "cabi_realloc"); // function 3
        let mut lower = CanonicalFunctionSection::new();
        // Function 4: name.
        lower.lower(1, [CanonicalOption::UTF8, CanonicalOption::Memory(0), CanonicalOption::Realloc(3)]);
        component.section(&lower);
        if !self.no_filler {
            alias(&mut component, 0, ExportKind::Table, "$imports");
            export_items(
                &mut component,
                &[
                    ("$imports", ExportKind::Table, 1),
                    ("0", ExportKind::Func, if self.circle { 2 } else { 4 }),
                ],
            ); // instance 5
            instantiate(&mut component, filler, &[("", 5)]);
        }
        if self.twice {
            instantiate(&mut component, holder, &[("host", 1)]);
        }
        if self.library_twice {
            instantiate(&mut component, library, &[("env", 3)]);
        }
        let run = if self.missing_export { "absent" } else { "run" };
        alias(&mut component, 4, ExportKind::Func, run); // function 5
        let mut lift = CanonicalFunctionSection::new();
        lift.lift(5, 0, []);
        let mut exports = ComponentExportSection::new();
        exports.export("run", ComponentExportKind::Func, 2, None);
        component.section(&lift).section(&exports);
        component.finish()
    }

    /// The module with memory, data, and the globals that a linker makes.
    fn holder(&self) -> Module {
        let mut types = TypeSection::new();
        types.ty().function([ValType::I32], [ValType::I32]);
        types.ty().function([], [ValType::I32]);
        let mut imports = ImportSection::new();
        imports.import("host", "double", EntityType::Function(0));
        let mut functions = FunctionSection::new();
        functions.function(1);
        let mut tables = TableSection::new();
        tables.table(table(2, None));
        let mut memories = MemorySection::new();
        memories.memory(memory(self.pages));
        let mut globals = GlobalSection::new();
        for (mutable, value) in
            [(true, self.stack), (false, 1024), (false, 1), (true, 1040), (true, self.counter)]
        {
            globals.global(global(mutable), &ConstExpr::i32_const(value));
        }
        let mut exports = ExportSection::new();
        for (name, kind, index) in [
            ("__stack_pointer", ExportKind::Global, 0),
            ("memory_base", ExportKind::Global, 1),
            ("table_base", ExportKind::Global, 2),
            ("got:x", ExportKind::Global, 3),
            ("memory", ExportKind::Memory, 0),
            ("table", ExportKind::Table, 0),
            ("count", ExportKind::Func, 1),
        ] {
            exports.export(name, kind, index);
        }
        // Returns the counter's value doubled, and counts.
        let mut count = Function::new([]);
        count.instructions().global_get(4).call(0).global_get(4).i32_const(1).i32_add().global_set(4).end();
        let mut code = CodeSection::new();
        code.function(&count);
        let mut data = DataSection::new();
        data.active(0, &ConstExpr::i32_const(1040), self.data.to_le_bytes());
        // Twice at the beginning of a page, which nobody reads.
        data.active(0, &ConstExpr::i32_const(8192), [1, 2, 3]);
        data.active(0, &ConstExpr::i32_const(8190), [4, 5, 6, 7]);
        let mut module = Module::new();
        module.section(&types).section(&imports).section(&functions).section(&tables).section(&memories);
        module.section(&globals).section(&exports).section(&code).section(&data);
        module
    }

    /// A shared library with the code.
    fn library(&self) -> Module {
        let mut types = TypeSection::new();
        types.ty().function([], []);
        types.ty().function([], [ValType::I32]);
        types.ty().function([ValType::I32], []);
        types.ty().function([ValType::I32], [ValType::I32]);
        types.ty().function([ValType::I32; 4], [ValType::I32]);
        let mut imports = ImportSection::new();
        let (stack_pointer, memory_base, table_base, x) = (0, 1, 2, 3);
        imports
            .import("env", "memory", memory(1))
            .import("env", "table", table(0, None))
            .import("env", "__stack_pointer", global(true))
            .import("env", "__memory_base", global(false))
            .import("env", "__table_base", global(false))
            .import("env", "x", global(true));
        let (count, double, name) = (0, 1, 2);
        imports
            .import("env", "count", EntityType::Function(1))
            .import("env", "double", EntityType::Function(3))
            .import("env", "name", EntityType::Function(2));
        let mut functions = FunctionSection::new();
        let (in_table, start, reallocate, run) = (3, 4, 5, 6);
        functions.function(1).function(0).function(4).function(3).function(0);
        let mut memories = MemorySection::new();
        if self.second_memory {
            memories.memory(memory(1));
        }
        let mut exports = ExportSection::new();
        exports.export("cabi_realloc", ExportKind::Func, reallocate);
        exports.export("run", ExportKind::Func, run);
        let mut elements = ElementSection::new();
        elements.active(
            None,
            &ConstExpr::global_get(table_base),
            Elements::Functions([in_table].as_slice().into()),
        );
        let word = MemArg { offset: 0, align: 2, memory_index: 0 };
        let mut code = CodeSection::new();
        let mut body = Function::new([]);
        body.instructions().i32_const(1_000_000).end();
        code.function(&body);
        let mut body = Function::new([]);
        body.instructions().end();
        code.function(&body);
        // The allocator gives out one place only.
        let mut body = Function::new([]);
        body.instructions().global_get(memory_base).i32_const(1024).i32_add().end();
        code.function(&body);
        // Traps for 0, and else adds up all that can be got hold of.
        let mut body = Function::new([]);
        body.instructions()
            .local_get(0)
            .i32_eqz()
            .if_(wasm_encoder::BlockType::Empty)
            .unreachable()
            .end()
            .global_get(stack_pointer)
            .i32_const(16)
            .i32_sub()
            .global_set(stack_pointer)
            .global_get(stack_pointer)
            .call(name)
            .global_get(stack_pointer)
            .i32_load(word) // the address of the name
            .i32_load8_u(MemArg { align: 0, ..word })
            .global_get(stack_pointer)
            .i32_load(MemArg { offset: 4, ..word }) // its length
            .i32_add()
            .local_get(0)
            .call(double)
            .i32_add()
            .call(count)
            .i32_add()
            .global_get(x)
            .i32_load(word) // the data
            .i32_add()
            .global_get(table_base)
            .call_indirect(0, 1)
            .i32_add()
            .global_get(stack_pointer)
            .i32_add()
            .end();
        code.function(&body);
        // Nothing calls this one.
        let mut body = Function::new([]);
        body.instructions().unreachable().end();
        code.function(&body);
        let mut names = NameMap::new();
        names.append(in_table, "in_the_table");
        names.append(run, "run_the_sample");
        names.append(run + 1, "never_called");
        let mut name_section = NameSection::new();
        name_section.functions(&names);
        let mut module = Module::new();
        if self.dylink {
            module.section(&CustomSection { name: "dylink.0".into(), data: [].as_slice().into() });
        }
        module.section(&types).section(&imports).section(&functions).section(&memories).section(&exports);
        if self.start {
            module.section(&StartSection { function_index: start });
        }
        module.section(&elements).section(&code).section(&name_section);
        module
    }

    /// One function that calls through a table.
    fn shim(&self) -> Module {
        let mut types = TypeSection::new();
        types.ty().function([ValType::I32], []);
        let mut functions = FunctionSection::new();
        functions.function(0);
        let mut tables = TableSection::new();
        tables.table(table(1, Some(1)));
        let mut exports = ExportSection::new();
        exports.export("0", ExportKind::Func, 0).export("$imports", ExportKind::Table, 0);
        let mut body = Function::new([]);
        if self.forged_shim {
            body.instructions().i32_const(4096).i32_const(0).call_indirect(0, 0).end();
        } else {
            body.instructions().local_get(0).i32_const(0).call_indirect(0, 0).end();
        }
        let mut code = CodeSection::new();
        code.function(&body);
        let mut module = Module::new();
        module.section(&types).section(&functions).section(&tables).section(&exports).section(&code);
        module
    }
}

/// Puts what it imports into the shim's table.
fn filler() -> Module {
    let mut types = TypeSection::new();
    types.ty().function([ValType::I32], []);
    let mut imports = ImportSection::new();
    imports.import("", "0", EntityType::Function(0)).import("", "$imports", table(1, Some(1)));
    let mut elements = ElementSection::new();
    elements.active(None, &ConstExpr::i32_const(0), Elements::Functions([0].as_slice().into()));
    let mut module = Module::new();
    module.section(&types).section(&imports).section(&elements);
    module
}

fn memory(minimum: u64) -> MemoryType {
    MemoryType { minimum, maximum: None, memory64: false, shared: false, page_size_log2: None }
}

fn table(minimum: u64, maximum: Option<u64>) -> TableType {
    TableType { element_type: RefType::FUNCREF, minimum, maximum, table64: false, shared: false }
}

fn global(mutable: bool) -> GlobalType {
    GlobalType { val_type: ValType::I32, mutable, shared: false }
}

fn instantiate(component: &mut Component, module: u32, arguments: &[(&str, u32)]) {
    let mut instances = InstanceSection::new();
    let arguments = arguments.iter().map(|(name, instance)| (*name, ModuleArg::Instance(*instance)));
    instances.instantiate(module, arguments.collect::<Vec<_>>());
    component.section(&instances);
}

fn export_items(component: &mut Component, items: &[(&str, ExportKind, u32)]) {
    let mut instances = InstanceSection::new();
    instances.export_items(items.to_vec());
    component.section(&instances);
}

fn alias(component: &mut Component, instance: u32, kind: ExportKind, name: &str) {
    let mut aliases = ComponentAliasSection::new();
    aliases.alias(Alias::CoreInstanceExport { instance, kind, name });
    component.section(&aliases);
}
