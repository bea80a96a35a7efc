//! The values of constant expressions.

use anyhow::{Result, bail};
use wasm_encoder::{ConstExpr, Ieee32, Ieee64, Instruction};
use wasmparser::Operator;

/// A number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Constant {
    I32(i32),
    I64(i64),
    F32(u32),
    F64(u64),
}

impl Constant {
    /// The instruction that gives the number.
    pub(crate) fn instruction(self) -> Instruction<'static> {
        match self {
            Constant::I32(value) => Instruction::I32Const(value),
            Constant::I64(value) => Instruction::I64Const(value),
            Constant::F32(bits) => Instruction::F32Const(Ieee32::new(bits)),
            Constant::F64(bits) => Instruction::F64Const(Ieee64::new(bits)),
        }
    }

    /// The expression that gives the number.
    pub(crate) fn expression(self) -> ConstExpr {
        match self {
            Constant::I32(value) => ConstExpr::i32_const(value),
            Constant::I64(value) => ConstExpr::i64_const(value),
            Constant::F32(bits) => ConstExpr::f32_const(Ieee32::new(bits)),
            Constant::F64(bits) => ConstExpr::f64_const(Ieee64::new(bits)),
        }
    }
}

/// Computes `expression`; `global` knows the values of globals. None if it
/// depends on one that `global` does not know.
///
/// # Errors
///
/// If the expression is of a kind that no linker makes.
pub(crate) fn evaluate(
    expression: &wasmparser::ConstExpr<'_>,
    global: &mut dyn FnMut(u32) -> Result<Option<Constant>>,
) -> Result<Option<Constant>> {
    use Constant::{F32, F64, I32, I64};
    let mut stack: Vec<Constant> = Vec::new();
    let mut operators = expression.get_operators_reader();
    while !operators.is_end_then_eof() {
        let value = match operators.read()? {
            Operator::I32Const { value } => I32(value),
            Operator::I64Const { value } => I64(value),
            Operator::F32Const { value } => F32(value.bits()),
            Operator::F64Const { value } => F64(value.bits()),
            Operator::GlobalGet { global_index } => match global(global_index)? {
                Some(value) => value,
                None => return Ok(None),
            },
            Operator::I32Add => match (stack.pop(), stack.pop()) {
                (Some(I32(right)), Some(I32(left))) => I32(left.wrapping_add(right)),
                _ => bail!("a constant expression of the wrong type"),
            },
            Operator::I64Add => match (stack.pop(), stack.pop()) {
                (Some(I64(right)), Some(I64(left))) => I64(left.wrapping_add(right)),
                _ => bail!("a constant expression of the wrong type"),
            },
            other => bail!("a constant expression with {other:?}"),
        };
        stack.push(value);
    }
    match stack[..] {
        [value] => Ok(Some(value)),
        _ => bail!("a constant expression without one value"),
    }
}
