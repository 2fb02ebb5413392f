// Reductions compiled for what every processor of the family has.
#include "fold.h"

namespace ds_comm {

constexpr FoldTable kBaseFolds = table();

}  // namespace ds_comm
